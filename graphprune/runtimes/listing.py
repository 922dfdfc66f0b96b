"""Which runtimes can be used here, and why the others cannot."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import GraphPruneError
from ..support.progress import watched
from ..support.tables import Column, render, table
from .adapters import PRECISIONS, RUNTIMES, Adapter, adapter
from .adapters.features import cpu_features
from .adapters.workers import Worker


@dataclasses.dataclass(frozen=True)
class RuntimeStatus:
    """One runtime on this machine.

    `missing`: why it cannot be used, and what to do; None where it can. `versions`: of its packages. `offered`:
    precision -> how it is reached on this machine's CPU; `refused`: precision -> why not, and what to do. `suffix`: of
    its files.
    """

    name: str
    title: str
    suffix: str
    missing: str | None
    versions: Mapping[str, str]
    offered: Mapping[str, str]
    refused: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether it can be used here."""
        return self.missing is None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and strings."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RuntimeList(Sequence[RuntimeStatus]):
    """All runtimes that graphprune knows; prints as a table. `features`: what the CPU can that kernels look at."""

    statuses: tuple[RuntimeStatus, ...]
    features: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.statuses)

    def __getitem__(self, index: Any) -> Any:
        return self.statuses[index]

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of those that can be used here."""
        return tuple(status.name for status in self.statuses if status.usable)

    def __str__(self) -> str:
        columns = [
            Column("runtime", "name", justify="left"),
            Column("usable", lambda s: "yes" if s.usable else "no", justify="left"),
            Column("precisions", lambda s: ", ".join(s.offered), justify="left"),
            Column("files", "suffix", justify="left"),
            Column("versions, or what is missing", _said, justify="left", wrap=True),
        ]
        lines = [f"CPU: {', '.join(self.features)}"] if self.features else []
        return render(table(self.statuses, columns, title="Runtimes"), *lines)


def usable_runtimes() -> RuntimeList:
    """Every runtime that graphprune knows, whether it can be used here, and why not where it cannot.

    Those whose packages are there are started, each in a process of its own, which takes some seconds.
    """
    names = list(RUNTIMES)
    found = watched(names, "looking at runtimes", len(names), "runtimes")
    return RuntimeList(tuple(_status(adapter(name)) for name in found), cpu_features())


def _status(asked: Adapter) -> RuntimeStatus:
    missing, versions = _absent(asked), {}
    if missing is None:
        try:
            with Worker(asked.name) as worker:
                described = worker.describe("fp32")
            missing, versions = described["missing"], described["versions"]
        except GraphPruneError as error:
            missing = str(error)
    offered = {name: asked.offered[name] for name in asked.precisions()}
    refused = {name: why for name in PRECISIONS if (why := asked.why_refused(name)) is not None}
    return RuntimeStatus(asked.name, asked.title, asked.suffix, missing, versions, offered, refused)


def _absent(asked: Adapter) -> str | None:
    """The first package that is not installed, found without importing anything."""
    for module, distribution in asked.packages:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{distribution} is not installed: {asked.cure}"
    return None


def _said(status: RuntimeStatus) -> str:
    return status.missing or ", ".join(f"{name} {version}" for name, version in status.versions.items())
