"""Where a network has to be fast: the provider and threads, and the latency table that goes with them."""

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
from ...support.types import PathLike
from ..machine import describe_machine, describe_versions
from ..providers import Provider, resolve_provider
from ..sessions import device_of
from .chains import make_chain_meter
from .meters import make_meter
from .table import LatencyTable


@dataclasses.dataclass(frozen=True)
class Target:
    """What latency budgets are about.

    `provider`: "auto" (CUDA if it loads, else the CPU), "cpu", "cuda" or a full name of ONNX Runtime. `threads`: inside
    a node. `provider_options`: as in `benchmark`. `table`: a file made by `graphprune.latency_table(...).save(path)` on
    another machine, or such a table: then nothing is measured here, and the plan is only as good as the table.
    `attempts`: how often at most a plan is exported and measured, to correct the prediction (0: never measured).
    """

    provider: str = "auto"
    threads: int = 1
    provider_options: Mapping[str, Any] | None = None
    table: LatencyTable | PathLike | None = None
    attempts: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (("threads", self.threads, 1), ("attempts", self.attempts, 0)):
            check_integer(f"target: {name}", value, least)
        if self.table is not None and not isinstance(self.table, (LatencyTable, str, os.PathLike)):
            raise GraphPruneError(f"target: table must be a path or a LatencyTable, got {type(self.table).__name__}")

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


def about(provider: Provider, threads: int, options: Mapping[str, str]) -> dict[str, Any]:
    """What tells the tables of two machines apart."""
    versions = describe_versions()
    kept = {name: versions[name] for name in ("onnxruntime",)}
    machine = describe_machine(provider, device_of(options))
    return {"provider": provider.name, "threads": threads, "options": dict(options), **machine, **kept}


def cache_path(described: Mapping[str, Any]) -> Path:
    """Where the table of this machine is kept between calls."""
    base = os.environ.get("GRAPHPRUNE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "graphprune" / f"latency-{digest}.json"


def own_table(provider: Provider, threads: int, options: dict[str, str]) -> LatencyTable:
    """This machine's table: what was measured before and still holds, and the means to measure more."""
    described = about(provider, threads, options)
    try:
        found = LatencyTable.load(cache_path(described))
    except GraphPruneError:  # not there, or written by another version: measured again
        found = LatencyTable(described)
    found.contexts.clear()  # a network's own times are measured anew
    found.meter = make_meter(provider, threads, options)
    found.chain_meter = make_chain_meter(provider, threads, options)
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


def provider_of(target: Target) -> Provider:
    """The provider that really runs. Raises GraphPruneError if it does not load."""
    return resolve_provider(target.provider)
