"""What `ignore` means on a recorded graph: the outputs that must stay."""

from __future__ import annotations

from torch import nn

from ..support.types import Ignore
from ..tracing.matching import NameTable, items_of
from .effects import Freeze, Reason
from .graph import DependencyGraph


def ignored_positions(ignore: Ignore, graph: DependencyGraph, model: nn.Module) -> list[Freeze]:
    """The outputs of ignored modules and parameters, as positions to freeze."""
    items = items_of(ignore, "ignore")
    if not items:
        return []
    names, analysis, roles = NameTable.of(model), graph.analysis, graph.roles
    out: list[Freeze] = []
    for item in items:
        meant = names.meant(item, "ignore")
        firsts: dict[str, str] = {}
        for name, first in graph.trace.aliases.items():
            if name in meant and first in graph.trace.parameters:
                firsts.setdefault(first, name)
        for first, name in firsts.items():
            reason = Reason("ignored", f"{item if isinstance(item, str) else name} is ignored")
            for axis in range(len(graph.trace.parameters[first].meta["val"].shape)):
                if (first, axis) in analysis.dims.roots and roles[(first, axis)] != "in":
                    out += [(analysis.dims.positions(d), reason) for d in analysis.dims.roots[(first, axis)]]
    return out
