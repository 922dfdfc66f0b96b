"""Agree on widths: allocate, check every size in the user's code, adjust or hold what does not come out right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from ..dependency import DependencyGraph, Group, Reason
from ..dependency.sizes import Conflict, Resolution, SizeSolver, positions_of
from ..dependency.temperature import Rescale, rescales
from ..errors import GraphPruneError
from ..importance.scorer import Scorer
from ..plans.rewriting import Rewriter
from .allocation import Allocation, Kinds, Limit, Settings, allocate
from .allocation.rounding import Ints

T = TypeVar("T")

# Each round freezes or fixes at least one group, so the number of groups bounds it; this is only a safety net.
_MAX_ROUNDS = 400


def settle(
    graph: DependencyGraph,
    settings: Settings,
    scorer: Scorer,
    limits: Callable[[DependencyGraph], list[Limit]],
    rewriter: Rewriter | None,
) -> tuple[DependencyGraph, Allocation, Resolution, list[Rescale]] | None:
    """Allocate, check every size in the user's code, adjust or hold what does not come out right, and repeat.

    The graph that comes back is `graph` with what had to be held. None where what does not come out right is to be
    rewritten instead: another graph is needed."""
    forced: dict[int, int] = {}
    possible: dict[int, Ints] = {}
    tried: set[tuple[int, int]] = set()
    for _ in range(_MAX_ROUNDS):
        free = _by_index(graph, possible)
        allocation = allocate(graph, scorer(graph), settings, _numbers(graph, forced), limits(graph), free)
        solver = SizeSolver(graph.analysis, allocation.gone)
        resolution = solver.resolve()
        factors, blocked = rescales(graph.analysis, solver)
        conflicts = resolution.conflicts + blocked
        if conflicts and settings.rounding.auto and not settings.even:
            settings = dataclasses.replace(settings, even=True)  # code that halves a width wants halves of one width
            continue
        if not conflicts:
            if rewriter is not None:
                released = rewriter.release(graph.analysis, allocation.gone)
                if released is not graph.analysis:
                    solver = SizeSolver(released, allocation.gone)
                    resolution = solver.resolve()
                    factors = rescales(released, solver)[0]
            return graph, allocation, resolution, factors
        if settings.budget is not None and _restricted(graph, conflicts, allocation, possible, settings.kinds):
            continue
        adjusted = _adjustments(graph, conflicts, allocation, tried, settings.kinds)
        if adjusted:
            forced.update(adjusted)
        elif rewriter is not None and rewriter.extend(conflicts):
            return None
        else:
            graph = _hold(graph, conflicts, allocation)
    raise GraphPruneError("planning did not settle on this model; please report it")


def _by_index(graph: DependencyGraph, values: Mapping[int, T]) -> dict[int, T]:
    """What is known of groups is remembered by a position, as groups are renumbered when they are rebuilt."""
    label = graph.analysis.label
    component = {int(label[position]): value for position, value in values.items()}
    first = {group.index: int(graph.units(group)[0]) for group in graph.groups}
    return {index: component[unit] for index, unit in first.items() if unit in component}


def _numbers(graph: DependencyGraph, forced: Mapping[int, int]) -> dict[int, int]:
    return {index: min(keep, graph.groups[index].size) for index, keep in _by_index(graph, forced).items()}


def _position(graph: DependencyGraph, group: Group) -> int:
    return int(np.nonzero(graph.analysis.label == graph.units(group)[0])[0][0])


def _restricted(
    graph: DependencyGraph,
    conflicts: list[Conflict],
    allocation: Allocation,
    possible: dict[int, Ints],
    kinds: Kinds,
) -> bool:
    """Note which widths a comparison in the code allows, for a budget to choose among; whether that is news."""
    found = False
    for conflict in conflicts:
        if conflict.possible is None:
            continue
        groups = _groups_on(graph, conflict)
        if len(groups) != 1 or not kinds.may_change(groups[0].kind):
            continue
        group, position = groups[0], _position(graph, groups[0])
        keep = group.size - len(allocation.removed.get(group.index, ()))
        widths, rest = np.divmod(keep * conflict.possible, conflict.survivors)
        widths = widths[(rest == 0) & (widths >= 1) & (widths <= group.size)]
        if position in possible:
            widths = np.intersect1d(widths, possible[position])
        if keep not in widths and group.size in widths and not np.array_equal(widths, possible.get(position, ())):
            possible[position] = widths
            found = True
    return found


def _groups_on(graph: DependencyGraph, conflict: Conflict) -> list[Group]:
    analysis = graph.analysis
    labels = np.unique(analysis.label[positions_of(analysis, conflict.axis_map)])
    return [g for g in graph.groups if np.isin(graph.units(g), labels).any()]


def _adjustments(
    graph: DependencyGraph,
    conflicts: list[Conflict],
    allocation: Allocation,
    tried: set[tuple[int, int]],
    kinds: Kinds,
) -> dict[int, int]:
    """Numbers of units to keep instead, where that makes the user's sizes right. Only groups of these kinds change.

    A width that many sizes are read from goes first and alone: once it is right, most other conflicts are gone.
    """
    for conflict in conflicts:
        if conflict.instead is not None:
            found = _adjust_axis(graph, conflict.instead, allocation, tried, kinds)
            if found:
                return found
    out: dict[int, int] = {}
    for conflict in conflicts:
        out.update(_adjust_axis(graph, conflict, allocation, tried, kinds))
    return out


def _adjust_axis(
    graph: DependencyGraph,
    conflict: Conflict,
    allocation: Allocation,
    tried: set[tuple[int, int]],
    kinds: Kinds,
) -> dict[int, int]:
    if conflict.wanted is None or not 1 <= conflict.wanted < conflict.length:
        return {}
    groups = _groups_on(graph, conflict)
    for group in sorted(groups, key=lambda g: (g.kind.is_head, g.index)):
        keep = group.size - len(allocation.removed.get(group.index, ()))
        new, rest = divmod(keep * conflict.wanted, conflict.survivors)
        position = _position(graph, group)
        if rest or not 1 <= new <= group.size or new == keep or (position, new) in tried:
            continue
        if group.kind.is_head and new == group.size:
            continue  # the module may be rewritten instead, or their features may go
        if not kinds.may_change(group.kind):
            continue
        if len(groups) > 1 and group.kind.is_channel:
            continue  # several groups laid side by side: which of them should give way is not determined
        tried.add((position, new))
        return {position: new}
    return {}


def _hold(graph: DependencyGraph, conflicts: list[Conflict], allocation: Allocation) -> DependencyGraph:
    """Freeze what the cheapest conflicts are about (of a product, the factor that goes); others may vanish with it."""
    analysis = graph.analysis
    costs = [sum(m.positions.size for g in _groups_on(graph, c) for m in g.members) for c in conflicts]
    limit = 2 * min((c for c in costs if c), default=0)
    freezes = []
    for conflict, cost in zip(conflicts, costs, strict=True):
        if cost <= limit:
            reason = Reason("size", conflict.text, conflict.node, conflict.source)
            label, axes = analysis.label, conflict.axis_map.items()
            parts = {d: v for d, v in axes if allocation.gone[label[analysis.dims.positions(d, v)]].any()}
            freezes.append((positions_of(analysis, parts or conflict.axis_map), reason))
    return graph.freezing(freezes)
