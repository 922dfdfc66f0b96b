"""From wanted widths to units: the allocation nearest to them that the code allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from .averaging import round_on_average
from .cells import Allocation, cells_of, select, solve, systems_of
from .settings import Settings


def realise(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    wanted: Sequence[float],
    ratios: Sequence[float] | None,
    weights: Floats,
) -> Allocation:
    """The allocation nearest to the wanted widths that obeys the equal-count constraints. `weights`: what groups count
    in a mean."""
    cells, constraints = cells_of(graph, settings.kinds.apart)
    rounding = settings.rounding
    by_ratio = ratios if settings.scope == "local" else None
    for cell in cells:
        group, units = graph.groups[cell.group], len(cell.units)
        keep = forced.get(cell.group, wanted[cell.group])
        ratio = None if by_ratio is None or cell.group in forced else by_ratio[cell.group]
        cell.asked = keep * units / group.size
        cell.keep = rounding.part(keep, units, group.size, ratio)
        if cell.group not in forced:
            cell.floor = rounding.floor(units) if settings.kinds.may_change(group.kind) else units
            cell.keep = max(cell.keep, cell.floor)
    systems = systems_of(cells, constraints)
    if rounding.auto:
        round_on_average(graph, scores, settings, cells, systems, forced, weights)
    for system in systems:
        solve(cells, system)
    return select(graph, scores, cells)
