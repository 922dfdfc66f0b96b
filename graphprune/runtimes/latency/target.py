"""Where a network has to be fast: runtime, precision, provider, threads, and the latency table that goes with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import GraphPruneError
from ...support.numbers import check_integer
from ...support.suggestions import check_choice
from ...support.types import PathLike
from ..adapters import PRECISIONS, RUNTIMES
from ..providers import resolve_provider
from .by_adapter import AdapterRig
from .networks import OnnxRig
from .rig import Rig
from .table import LatencyTable


@dataclasses.dataclass(frozen=True)
class Target:
    """What latency budgets are about.

    - `provider`: "auto" (CUDA if it loads, else the CPU), "cpu", "cuda" or a full name of ONNX Runtime. Other runtimes
      have the CPU alone.
    - `threads`: inside a node.
    - `provider_options`: as in `benchmark`; of ONNX Runtime in fp32.
    - `table`: a file made by `graphprune.latency_table(...).save(path)` on another machine, or such a table: then
      nothing is measured here, and the plan is only as good as the table.
    - `attempts`: how often at most a plan is exported and measured, to correct the prediction (0: never measured).
    - `runtime`, `precision`: as in `graphprune.export`. Widths that are fast in one are slow in another: a latency is
      that of a file of this runtime in this precision, int8 quantised with the example input alone, as times do not
      depend on ranges. What runs in a runtime that does not time its nodes (all but ONNX Runtime and OpenVINO) is
      timed computation by computation, which takes minutes once for each kind of machine.
    - `python`: the interpreter of another environment, where the runtime is installed.

    Raises GraphPruneError for what is unknown or out of range; the runtime is looked for when it is needed.
    """

    provider: str = "auto"
    threads: int = 1
    provider_options: Mapping[str, Any] | None = None
    table: LatencyTable | PathLike | None = None
    attempts: int = 5
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    python: PathLike | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("threads", self.threads, 1), ("attempts", self.attempts, 0)):
            check_integer(f"target: {name}", value, least)
        if self.table is not None and not isinstance(self.table, (LatencyTable, str, os.PathLike)):
            raise GraphPruneError(f"target: table must be a path or a LatencyTable, got {type(self.table).__name__}")
        check_choice("target: runtime", self.runtime, tuple(RUNTIMES))
        check_choice("target: precision", self.precision, PRECISIONS)
        here = (self.runtime, self.precision, self.python) == ("onnxruntime", "fp32", None)
        if self.provider_options and not here:
            raise GraphPruneError(
                "target: provider_options are those of ONNX Runtime in fp32, in this environment; leave them out"
            )

    @classmethod
    def of(cls, target: Target | None) -> Target:
        """Raises GraphPruneError unless this is a target, or None for the default one."""
        if target is None:
            return cls()
        if not isinstance(target, cls):
            raise GraphPruneError(f"target: expected a graphprune.Target, got {type(target).__name__}")
        return target

    def options(self) -> dict[str, str]:
        """Provider options as texts."""
        return {str(k): str(v) for k, v in (self.provider_options or {}).items()}


def cache_path(described: Mapping[str, Any]) -> Path:
    """Where the table of this machine is kept between calls."""
    base = os.environ.get("GRAPHPRUNE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "graphprune" / f"latency-{digest}.json"


def own_table(rig: Rig) -> LatencyTable:
    """This machine's table: what was measured before and still holds, and the means to measure more."""
    try:
        found = LatencyTable.load(cache_path(rig.about))
    except GraphPruneError:  # not there, or written by another version: measured again
        found = LatencyTable(rig.about)
    found.contexts.clear()  # a network's own times are measured anew
    found.meter, found.chain_meter = rig.meter, rig.chain_meter
    return found


def keep(table: LatencyTable) -> None:
    """Remember what was measured. A cache that cannot be written is no reason to fail."""
    path = cache_path(table.about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = dataclasses.replace(table, contexts={})
        stored.save(path)
    except (OSError, GraphPruneError):
        return


def rig_of(target: Target) -> Rig:
    """What to measure with. Raises GraphPruneError where the runtime, precision or provider cannot be used here."""
    if (target.runtime, target.precision, target.python) == ("onnxruntime", "fp32", None):
        return OnnxRig(resolve_provider(target.provider), target.threads, target.options())
    return AdapterRig(target.runtime, target.precision, target.provider, target.threads, target.python)


def brought_table(target: Target) -> LatencyTable:
    """The table that the target brings along. Raises GraphPruneError where it is of another runtime or precision."""
    assert target.table is not None
    found = LatencyTable.of(target.table)
    made = tuple(found.about.get(name, usual) for name, usual in (("runtime", "onnxruntime"), ("precision", "fp32")))
    if made != (target.runtime, target.precision):
        raise GraphPruneError(
            f"target: the table was made for {made[0]} in {made[1]}, not for {target.runtime} in {target.precision}; "
            f"say Target(runtime={made[0]!r}, precision={made[1]!r}, table=...), or make another"
        )
    return found
