"""From wanted widths to units: the allocation nearest to them that the code allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from .averaging import round_on_average
from .cells import Allocation, Cell, cells_of, select, solve, systems_of
from .selection import apart, kinds_of
from .settings import Settings
from .steps import nearest


def realise(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    wanted: Sequence[float],
    ratios: Sequence[float] | None,
) -> Allocation:
    """The allocation nearest to the wanted widths that obeys the equal-count constraints."""
    cells, constraints = cells_of(graph, apart(settings.granularity))
    kinds = kinds_of(settings.granularity)
    for cell in cells:
        size = graph.groups[cell.group].size
        keep = forced.get(cell.group, wanted[cell.group])
        exact = ratios is None or cell.group in forced
        cell.asked = keep * len(cell.units) / size
        cell.keep = _share(cell, keep, size, settings, 0.0 if ratios is None else ratios[cell.group], exact)
        if cell.group not in forced:
            alien = kinds is not None and graph.groups[cell.group].kind not in kinds
            cell.floor = len(cell.units) if alien else settings.floor(len(cell.units))
            cell.keep = max(cell.keep, cell.floor)
    systems = systems_of(cells, constraints)
    if settings.auto:
        round_on_average(graph, scores, settings, cells, systems, forced)
    for system in systems:
        solve(cells, system)
    return select(graph, scores, cells)


def _share(cell: Cell, keep: float, size: int, settings: Settings, ratio: float, forced: bool) -> int:
    """How many of a group's kept units fall to one of its cells."""
    n = len(cell.units)
    if n == size or keep == size:
        return min(n, int(keep))
    if settings.scope == "local" and not forced and settings.round_to == 1:
        share = n - nearest(ratio * n)
    else:
        share = nearest(keep * n / size)
    return max(min(n, 1), min(n, share))
