"""Lengths of axes as a function of the widths of groups, and costs that are sums of products of such lengths.

Along an axis, an index survives if all its coordinates do; with fractions f_g of the groups' units kept, an axis has
sum_i prod_g f_g indices, and a call costs the product of its axes' lengths. A layer's cost depends on the groups on
both of its sides, so costs are no sums over groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from ..tracing.recorder import TensorMeta
from ..tracing.work import Loop, Term
from .analysis import Analysis
from .graph import DependencyGraph
from .sizes import gone_on_axis
from .state import AxisMap, Mask, State, Vector

Floats = npt.NDArray[np.float64]
_MANY = 4096  # counting them one by one takes longer than sorting


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis: where its indices come from, and how many belong to each combination of groups."""

    axis_map: AxisMap
    length: int
    parts: tuple[tuple[tuple[int, ...], int], ...]

    @functools.cached_property
    def groups(self) -> frozenset[int]:
        """The groups that its length depends on."""
        return frozenset(g for groups, _ in self.parts for g in groups)

    def value(self, kept: Sequence[Any] | Floats) -> Any:
        """Its length, where a fraction `kept[g]` of every group is there: a number, or an array if one of them is."""
        return sum(n * math.prod(kept[g] for g in groups) for groups, n in self.parts)

    def slope(self, kept: Floats) -> dict[int, float]:
        out: dict[int, float] = {}
        for groups, n in self.parts:
            for i, g in enumerate(groups):
                rest = math.prod(kept[h] for j, h in enumerate(groups) if j != i)
                out[g] = out.get(g, 0.0) + n * rest
        return out


class Axes:
    """The axes of one network's tensors; equal ones are made once."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph, self._analysis = graph, graph.analysis
        self._group_of = np.full(self._analysis.components, -1, np.int64)
        for group in graph.groups:
            self._group_of[graph.units(group)] = group.index
        self._made: dict[tuple[int, ...], Axis] = {}
        self._only: dict[int, int | None] = {}

    def axis(self, axis_map: AxisMap, length: int) -> Axis:
        """The axis with these coordinates."""
        key = (length, *axis_map, *map(id, axis_map.values()))
        if key not in self._made:
            alike = self._alike(axis_map, length)
            parts = alike or self._parts([self._groups_on(d, v) for d, v in axis_map.items()])
            self._made[key] = Axis(axis_map, length, parts)
        return self._made[key]

    def _alike(self, axis_map: AxisMap, length: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        """The one part of an axis whose indices all belong to the same groups, as is usual; empty for others."""
        groups = [self._only_group(dim) for dim in axis_map]
        if None in groups or not self._analysis.dims.are_whole(axis_map):
            return ()
        return ((tuple(sorted({g for g in groups if g is not None and g >= 0})), length),)

    def _only_group(self, dim: int) -> int | None:
        """The group that all positions of a Dim are in, -1 if that is none, or None where they differ."""
        if dim not in self._only:
            dims, label = self._analysis.dims, self._analysis.label
            groups = self._group_of[label[dims.offset[dim] : dims.offset[dim] + dims.size[dim]]]
            first = int(groups[0])
            self._only[dim] = first if np.logical_and.reduce(groups == first) else None
        return self._only[dim]

    def _parts(self, columns: Sequence[Vector]) -> tuple[tuple[tuple[int, ...], int], ...]:
        """How many indices belong to each combination of groups; `columns`: the group of each index by coordinate."""
        base = len(self.graph.groups) + 1
        if base ** len(columns) < 2**62:  # a combination is one number
            code = functools.reduce(lambda code, column: code * base + column + 1, columns, np.zeros(1, np.int64))
            if base ** len(columns) <= _MANY:
                counts = np.bincount(code)
                codes = np.flatnonzero(counts)
                counts = counts[codes]
            else:
                codes, counts = np.unique(code, return_counts=True)
            rows = np.stack([codes // base**i % base - 1 for i in reversed(range(len(columns)))], 1)
        else:
            rows, counts = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
        merged: Counter[tuple[int, ...]] = Counter()
        for row, n in zip(rows.tolist(), counts.tolist(), strict=True):
            merged[tuple(sorted({g for g in row if g >= 0}))] += n
        return tuple(merged.items())

    def _groups_on(self, dim: int, coordinates: Vector) -> Vector:
        """The group of each coordinate on a Dim, -1 for those in none."""
        groups: Vector = self._group_of[self._analysis.label[self._analysis.dims.offset[dim] + coordinates]]
        if coordinates.min(initial=0) < 0:
            groups = np.where(coordinates >= 0, groups, -1)
        return groups

    def of(self, node: fx.Node, result: int = 0) -> list[Axis]:
        """The axes of a recorded tensor; `result`: which, of a call with several."""
        return [self.axis(m, n) for m, n in axes_of(self.graph, node, result)]

    def exact(self, axis: Axis, gone: Mask) -> int:
        """The length of an axis when these components are removed."""
        return axis.length - int(gone_on_axis(self._analysis, axis.axis_map, axis.length, gone).sum())


class ProductCosts:
    """A cost model whose terms are a constant times the lengths of some axes."""

    def __init__(self, graph: DependencyGraph, axes: Axes | None = None) -> None:
        self.graph = graph
        self.axes = axes or Axes(graph)
        self._factors: dict[tuple[int, ...], float] = {}
        self._free: dict[tuple[int, ...], tuple[Axis, ...]] = {}
        self.constant = 0.0

    def add(self, factor: float, axes: Sequence[tuple[AxisMap, int]]) -> None:
        """A term: `factor` times the lengths of these axes (coordinates, length)."""
        found = [self.axes.axis(m, n) if m else n for m, n in axes]
        free = tuple(a for a in found if isinstance(a, Axis) and a.groups)
        factor *= math.prod(a.length if isinstance(a, Axis) else a for a in found if a not in free)
        if free:
            key = tuple(sorted(id(a) for a in free))
            self._free[key] = free
            self._factors[key] = self._factors.get(key, 0.0) + factor
        else:
            self.constant += factor

    @functools.cached_property
    def _terms(self) -> list[tuple[float, tuple[Axis, ...]]]:
        return [(factor, self._free[key]) for key, factor in self._factors.items()]

    @functools.cached_property
    def _used(self) -> list[Axis]:
        return list({id(a): a for _, axes in self._terms for a in axes}.values())

    @functools.cached_property
    def _by_group(self) -> dict[int, list[tuple[float, tuple[Axis, ...]]]]:
        out: dict[int, list[tuple[float, tuple[Axis, ...]]]] = {}
        for term in self._terms:
            for g in frozenset[int]().union(*(a.groups for a in term[1])):
                out.setdefault(g, []).append(term)
        return out

    @property
    def full(self) -> float:
        return self.constant + sum(f * math.prod(a.length for a in axes) for f, axes in self._terms)

    def value(self, kept: Floats) -> float:
        lengths = {id(a): float(a.value(kept)) for a in self._used}
        return self.constant + sum(f * math.prod(lengths[id(a)] for a in axes) for f, axes in self._terms)

    def curve(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        varied: list[Any] = list(kept)
        varied[group] = fractions
        out = np.zeros(len(fractions))
        for factor, axes in self._by_group.get(group, ()):
            out += factor * math.prod(a.value(varied) for a in axes)
        return out

    def partners(self, group: int) -> Set[int]:
        axes = [a for _, axes in self._by_group.get(group, ()) for a in axes]
        return frozenset[int]().union(*(a.groups for a in axes)) - {group}

    def slopes(self, kept: Floats) -> Floats:
        out = np.zeros(len(self.graph.groups))
        lengths = {id(a): float(a.value(kept)) for a in self._used}
        slopes = {id(a): a.slope(kept) for a in self._used}
        for factor, axes in self._terms:
            for i, axis in enumerate(axes):
                rest = factor * math.prod(lengths[id(b)] for j, b in enumerate(axes) if j != i)
                for g, s in slopes[id(axis)].items():
                    out[g] += rest * s
        return out

    def exact(self, gone: Mask) -> float:
        lengths = {id(a): self.axes.exact(a, gone) for a in self._used}
        return self.constant + sum(f * math.prod(lengths[id(a)] for a in axes) for f, axes in self._terms)


def loop_axes(analysis: Analysis, term: Term) -> list[tuple[AxisMap, int]]:
    """Coordinates and length of each loop of a term."""
    return [(_coordinates(analysis, loop), loop.length) for loop in term]


def _coordinates(analysis: Analysis, loop: Loop) -> AxisMap:
    """Where the steps of a loop come from: as the first of its tensors has it that has coordinates there."""
    for node, axis in loop.places:
        found = _state(analysis, node, 0)
        if found is not None and axis in found.axes:
            return found.axes[axis]
    return {}


def axes_of(graph: DependencyGraph, node: fx.Node, result: int = 0) -> list[tuple[AxisMap, int]]:
    """Coordinates and length of every axis of a recorded tensor; `result`: which, of a call with several."""
    state = _state(graph.analysis, node, result)
    meta = node.meta.get("val")
    meta = meta[result] if isinstance(meta, tuple) else meta
    shape = meta.shape if isinstance(meta, TensorMeta) else ()
    return [({} if state is None else state.axis(a), n) for a, n in enumerate(shape)]


def _state(analysis: Analysis, node: fx.Node, result: int) -> State | None:
    found = analysis.states.get(node)
    return (found[result] if result < len(found) else None) if isinstance(found, list) else found
