"""Widths of "auto": every group above or below what was asked, so that the mean is what was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...dependency import DependencyGraph, GroupKind
from ...dependency.axes import Floats
from .cells import Cell, System
from .costs import mac_costs
from .rounding import AUTO, FINE, NEAR, Item, on_average
from .settings import Settings

# Kinds of groups of which networks have one in each of many equal layers; features of queries and values go alike.
_OF_LAYERS = frozenset(kind for kind in GroupKind if kind.is_feature or kind is GroupKind.MLP_CHANNEL)


def round_on_average(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    cells: Sequence[Cell],
    systems: Sequence[System],
    forced: Mapping[int, int],
    weights: Floats,
) -> None:
    """Give every cell an allowed width next to what was asked. Cells that must stay equal go the same way, and so do
    equal layers of a transformer, whose widths a configuration can then hold. Whole heads are rounded to nearest."""
    together = _in_step(graph, cells, systems, settings.even)
    free = {cell.group for cell in cells if cell.asked < len(cell.units) and cell.group not in forced}
    all_of_it = float(weights[list(free)].sum())
    best = math.inf
    for grid in (AUTO, FINE):
        ends = [
            [_ends(graph, cells[c], settings, grid, cells[c].group in forced) for c in members] for members in together
        ]
        items = [
            _item(graph, scores, [cells[c] for c in members], pairs, forced, weights)
            for members, pairs in zip(together, ends, strict=True)
        ]
        down, off = on_average(items)
        if off < best - 1e-12:
            best = off
            keep = [[low if d else high for low, high in pairs] for pairs, d in zip(ends, down, strict=True)]
        if best <= NEAR * all_of_it:
            break
    for members, widths_of_set in zip(together, keep, strict=True):
        for c, width in zip(members, widths_of_set, strict=True):
            cells[c].keep = width


def macs_by_group(graph: DependencyGraph) -> Floats:
    """The multiply-accumulates that each group has a part in, relative to their mean; a little for those in none."""
    macs = mac_costs(graph).slopes(np.ones(len(graph.groups)))
    mean = float(macs.mean()) if len(macs) else 0.0
    return np.maximum(macs / mean, 1e-3) if mean > 0 else np.ones(len(graph.groups))


def _ends(graph: DependencyGraph, cell: Cell, settings: Settings, grid: str, forced: bool) -> tuple[int, int]:
    """The allowed widths below and above what is asked; the same where there is no choice."""
    if forced:
        return cell.keep, cell.keep
    group = graph.groups[cell.group]
    return settings.rounding.ends(cell.asked, len(cell.units), group.size, group.kind, cell.floor, grid)


def _item(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    cells: Sequence[Cell],
    ends: Sequence[tuple[int, int]],
    forced: Mapping[int, int],
    weights: Floats,
) -> Item:
    item = Item(0.0, 0.0, 0.0, 0.0)
    for cell, (low, high) in zip(cells, ends, strict=True):
        n, worth = len(cell.units), weights[cell.group] / graph.groups[cell.group].size
        between = np.sort(scores[cell.group][cell.units])[n - high : n - low]
        asked = low if cell.group in forced else cell.asked
        item = Item(
            item.asked + worth * (n - asked),
            item.less + worth * (n - high),
            item.more + worth * (n - low),
            item.loss + float(between.sum()),
        )
    return item


def _in_step(
    graph: DependencyGraph, cells: Sequence[Cell], systems: Sequence[System], even: bool
) -> list[list[int]]:
    """Sets of cells that go the same way: with `even` all of one size."""
    sets = [system.members for system in systems]
    bound = {c for members in sets for c in members}
    sets += [[c] for c in range(len(cells)) if c not in bound]
    found: dict[Any, list[int]] = {}
    for i, members in enumerate(sets):
        groups = [graph.groups[cells[c].group] for c in members]
        key: Any = i
        if even or all(g.kind in _OF_LAYERS for g in groups):
            alike = [g.structure if g.kind is GroupKind.MLP_CHANNEL and not even else str(g.size) for g in groups]
            key = tuple((a, round(cells[c].asked, 6)) for a, c in zip(alike, members, strict=True))
        found.setdefault(key, []).extend(members)
    return list(found.values())
