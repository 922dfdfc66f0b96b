"""What graphprune asks of a runtime, so that one export, one proof and one benchmark serve all.

An adapter writes a file from a `Source`, opens it with inputs at hand, and says what is really in force. It neither
compares nor times: that is the same for all (`graphprune.export`, `graphprune.benchmark`). Adapters import their
packages inside their methods, so that one which is missing costs nothing, and is said by `missing`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...errors import GraphPruneError
from ...support.suggestions import check_choice
from ..profiles import NodeTime
from .naming import first_lines
from .source import Source

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


class Session(abc.ABC):
    """A file opened in a runtime, with inputs in place."""

    @abc.abstractmethod
    def run(self) -> None:
        """One run on the inputs that were loaded last, finished when this returns: what is timed."""

    @abc.abstractmethod
    def load(self, tensors: Sequence[Tensor]) -> None:
        """Put other inputs in place: the shapes are those that the session was opened with."""

    @abc.abstractmethod
    def outputs(self) -> list[Tensor]:
        """The results of the last run, on the CPU, in the order of the model's outputs."""

    def in_force(self) -> str:
        """The precision that really runs, in the runtime's own words."""
        return ""


@dataclasses.dataclass(frozen=True)
class Opening:
    """How a file is opened. `names`: of the inputs, in order; `tensors`: the first inputs, whose shapes stay."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    precision: str = "fp32"
    threads: int = 1
    provider: str | None = None


class Adapter(abc.ABC):
    """One runtime.

    `name`: as in `runtime=`. `title`: its own name. `suffix`: of the file that `path` names; others lie beside it.
    `form`: what it is written from. `any_batch`: one file takes every batch size. `packages`: (import name, name of the
    distribution). `extra`: the extra of graphprune that installs them. `offered`: precision -> how it is reached.
    `refused`: precision -> why it is not there and what to do (`why_refused` also looks at machine and provider).
    `tolerances`: largest allowed relative error against the model in float32; int8 has none, as what is lost depends on
    the network: its error is reported.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    form: ClassVar[Literal["onnx", "program"]]
    any_batch: ClassVar[bool] = False
    packages: ClassVar[Sequence[tuple[str, str]]] = ()
    extra: ClassVar[str | None] = None
    offered: ClassVar[Mapping[str, str]]
    refused: ClassVar[Mapping[str, str]] = {}
    tolerances: ClassVar[Mapping[str, float]] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
    providers: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        """Write the file `path` and those that belong to it beside it (`files`); notes for the user.

        Called in an empty folder. `precision` is one of `offered`; with "int8" the source has calibration inputs.

        Raises GraphPruneError with the runtime's reason, and the layer where it names one.
        """

    @abc.abstractmethod
    def open(self, path: Path, opening: Opening) -> Session:
        """Raises GraphPruneError where the file cannot be loaded, or does not take these inputs."""

    def nodes(self, path: Path, opening: Opening, runs: int) -> Sequence[NodeTime]:
        """What each node of the file takes in a run, seen in so many; none where the runtime does not time them.

        Raises GraphPruneError as `open` does.
        """
        return ()

    def files(self, path: Path) -> tuple[Path, ...]:
        """All files of an artifact, that of `path` last: it is put in place last."""
        return (path,)

    @functools.cached_property
    def missing(self) -> str | None:
        """None if the runtime can be used in this process, else why not and what to do. Asked once."""
        for module, distribution in self.packages:
            try:
                self.bring(module)
            except ImportError as error:
                return f"{distribution} cannot be imported ({first_lines(error, 1)}): {self.cure}"
            except Exception as error:  # a package that is there and broken
                return f"{distribution} fails when it is imported: {first_lines(error, 1)}"
        return self.unable()

    def bring(self, module: str) -> Any:
        """Import one of the packages."""
        return importlib.import_module(module)

    def unable(self) -> str | None:
        """Why this machine cannot run it although its packages are there; None where it can."""
        return None

    @property
    def cure(self) -> str:
        """The line that installs what is missing."""
        return f'pip install "graphprune[{self.extra}]"' if self.extra else "pip install graphprune"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of its packages, those that are there."""
        found = {}
        for module, distribution in self.packages:
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                # One of several distributions of the same module, such as onnxruntime-gpu.
                own = getattr(sys.modules.get(module), "__version__", None)
                if own is not None:
                    found[distribution] = str(own)
        return found

    def layout(self, precision: str) -> str:
        """How images lie in memory inside: for reports."""
        return "NCHW"

    def why_refused(self, precision: str, provider: str | None = None) -> str | None:
        """Why one of `PRECISIONS` is not offered on this machine and provider, and what to do; None where it is."""
        return None if precision in self.offered else self.refused.get(precision, "it has no kernels for it")

    def precisions(self, provider: str | None = None) -> tuple[str, ...]:
        """Those offered on this machine and provider."""
        return tuple(name for name in PRECISIONS if self.why_refused(name, provider) is None)

    def check_precision(self, precision: Any, provider: str | None = None) -> None:
        """Raise GraphPruneError unless the precision is offered on this machine and provider."""
        check_choice("precision", precision, PRECISIONS)
        why = self.why_refused(precision, provider)
        if why is not None:
            where = self.name if provider is None else f"{self.name} with provider {provider!r}"
            offered = ", ".join(self.precisions(provider))
            raise GraphPruneError(f"precision {precision!r} is not offered for {where}: {why}. Offered: {offered}")

    def check_usable(self) -> None:
        """Raise GraphPruneError where the runtime cannot be used in this process."""
        if self.missing is not None:
            raise GraphPruneError(f"runtime {self.name!r}: {self.missing}")

    def check_path(self, path: Path) -> None:
        """Raise GraphPruneError unless the name of the file ends as this runtime's files do."""
        if not path.name.endswith(self.suffix) or path.name == self.suffix:
            raise GraphPruneError(
                f"path: {self.title} files end in {self.suffix!r}, got {path.name!r}; write {_stem(path)}{self.suffix}"
            )


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or "model"
