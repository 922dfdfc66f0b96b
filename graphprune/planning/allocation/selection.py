"""What names in a request mean: ratios by name or pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ...dependency import DependencyGraph
from ...errors import GraphPruneError
from ...tracing.matching import NameTable


def check_ratio(value: Any, where: str = "ratio") -> float:
    """A fraction of channels to remove, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 <= float(value) < 1:
        raise GraphPruneError(
            f"{where}: expected a number in [0, 1), the fraction of channels to remove; got {value!r}"
        )
    return float(value)


def matching_ratios(ratio: float | Mapping[str, float], graph: DependencyGraph) -> list[float]:
    """The ratio of every group, by the names and patterns that mean a parameter producing it (`winners`); 0 where none
    does."""
    if not isinstance(ratio, Mapping):
        return [ratio] * len(graph.groups)
    return [0.0 if pattern is None else ratio[pattern] for pattern in winners(ratio, graph)]


def names_in(graph: DependencyGraph) -> NameTable:
    """The names of the network that was recorded."""
    trace = graph.trace
    return NameTable({path: path for path in trace.modules}, {**trace.aliases, **trace.sources})


def winners(patterns: Iterable[str], graph: DependencyGraph) -> list[str | None]:
    """For every group the pattern that counts for what produces it, of several parameters the one that matches best
    (`NameTable.ranked`); None where none does."""
    ranked = names_in(graph).ranked(patterns, "ratio")
    found = ([ranked[name] for name in names if name in ranked] for names in producers(graph))
    return [max(ranks)[1] if ranks else None for ranks in found]


def producers(graph: DependencyGraph) -> list[list[str]]:
    """For every group the parameters that produce its channels, under all their names."""
    aliases: dict[str, list[str]] = {}
    for name, first in graph.trace.aliases.items():
        aliases.setdefault(first, []).append(name)
    out = []
    for group in graph.groups:
        makers = [m for m in group.members if m.role == "out"] or list(group.members)
        out.append([name for m in makers for name in aliases.get(m.parameter, [m.parameter])])
    return out
