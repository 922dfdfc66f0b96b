"""What a network costs as a function of the widths of its groups: sums of products of axis lengths.

A layer's cost depends on the groups on both of its sides, so costs are no sums over groups. Along an axis, an index
survives if all its coordinates do; with fractions f_g of the groups' units kept, an axis has sum_i prod_g f_g indices,
and a call costs the product of its axes' lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from ..counting import macs_of
from ..dependency import DependencyGraph
from ..dependency.sizes import Mask, gone_on_axis
from ..dependency.state import AxisMap
from ..surgery import Fold, fold_names
from ..tracing.names import named_tensors, operator_name

Floats = npt.NDArray[np.float64]


class CostModel(Protocol):
    """A cost that a budget limits: of fractions kept (an estimate with its slopes), and of one exact choice."""

    @property
    def full(self) -> float:
        """The cost with everything kept."""

    def value(self, kept: Floats) -> float:
        """The cost with a fraction `kept[g]` of the units of group g."""

    def slopes(self, kept: Floats) -> Floats:
        """Its derivatives by those fractions."""

    def exact(self, gone: Mask) -> float:
        """The cost when these components are removed."""

    def curve(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        """The part of the cost that depends on this group, at each of these fractions; the others as in `kept`."""

    def partners(self, group: int) -> Set[int]:
        """The groups whose widths change `curve` of this one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis: where its indices come from, and how many belong to each combination of groups."""

    axis_map: AxisMap
    length: int
    parts: tuple[tuple[tuple[int, ...], int], ...]

    @property
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
        self.graph = graph
        total = int(graph.analysis.label.max()) + 1
        self._group_of = np.full(total, -1, np.int64)
        for group in graph.groups:
            self._group_of[graph.units(group)] = group.index
        self._made: dict[tuple[int, ...], Axis] = {}

    def axis(self, axis_map: AxisMap, length: int) -> Axis:
        """The axis with these coordinates."""
        key = (length, *(x for d, v in axis_map.items() for x in (d, id(v))))
        if key not in self._made:
            offset = self.graph.analysis.dims.offset
            label = self.graph.analysis.label
            columns = [np.where(v >= 0, self._group_of[label[offset[d] + v]], -1) for d, v in axis_map.items()]
            if columns:
                rows, counts = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
                merged: Counter[tuple[int, ...]] = Counter()
                for row, n in zip(rows.tolist(), counts.tolist(), strict=True):
                    merged[tuple(sorted({g for g in row if g >= 0}))] += n
                parts = tuple(merged.items())
            else:
                parts = (((), length),)
            self._made[key] = Axis(axis_map, length, parts)
        return self._made[key]

    def of(self, node: fx.Node) -> list[Axis]:
        """The axes of a recorded tensor."""
        return [self.axis(m, n) for m, n in axes_of(self.graph, node)]

    def exact(self, axis: Axis, gone: Mask) -> int:
        """The length of an axis when these components are removed."""
        return axis.length - int(gone_on_axis(self.graph.analysis, axis.axis_map, axis.length, gone).sum())


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
        found = [self.axes.axis(m, n) for m, n in axes]
        free = tuple(a for a in found if a.groups)
        factor *= math.prod(a.length for a in found if a not in free)
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


_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "linear": 0, "addmm": 1, "baddbmm": 1}
_ATTENTION = "scaled_dot_product_attention"


def mac_costs(graph: DependencyGraph) -> ProductCosts:
    """Multiply-accumulates of the recorded run, as `graphprune.count` counts them. Calls of kinds other than
    convolutions, matrix products and attention are held at what they cost now."""
    costs = ProductCosts(graph)
    for node in graph.trace.graph.nodes:
        macs = macs_of(node)
        if macs:
            _add_call(costs, graph, node, macs)
    return costs


def _add_call(costs: ProductCosts, graph: DependencyGraph, node: fx.Node, macs: int) -> None:
    operation = operator_name(node)
    axes: list[tuple[AxisMap, int]]
    if operation == "convolution" and isinstance(node.args[1], fx.Node):
        axes = axes_of(graph, node.args[1])
    elif operation in _PRODUCTS and isinstance(node.args[_PRODUCTS[operation]], fx.Node):
        left = node.args[_PRODUCTS[operation]]
        assert isinstance(left, fx.Node)
        axes = [*axes_of(graph, node), axes_of(graph, left)[-1]]
    elif operation.startswith((_ATTENTION, "_" + _ATTENTION)):
        _add_attention(costs, graph, node, macs)
        return
    else:
        axes = []
    costs.add(macs / math.prod(n for _, n in axes), axes)


def _add_attention(costs: ProductCosts, graph: DependencyGraph, node: fx.Node, macs: int) -> None:
    """Scores: query axes x keys x features; results: the same with the value's features."""
    query, key, value = (axes_of(graph, n) for n in node.args[:3])  # type: ignore[arg-type]
    shared = [*query[:-1], key[-2]]
    width = query[-1][1] + value[-1][1]
    unit = macs / (math.prod(n for _, n in shared) * width)
    costs.add(unit, [*shared, query[-1]])
    costs.add(unit, [*shared, value[-1]])


def axes_of(graph: DependencyGraph, node: fx.Node) -> list[tuple[AxisMap, int]]:
    """Coordinates and length of every axis of a recorded tensor."""
    state = graph.analysis.state(node)
    return [(state.axis(a), n) for a, n in enumerate(state.shape)]


def parameter_costs(graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> ProductCosts:
    """Elements of all parameters of the pruned model; `folds`: the batch norms it will not have any more."""
    costs = ProductCosts(graph)
    named = named_tensors(model)
    parameters = {id(p) for p in model.parameters()}
    lost = {f"{f.batch_norm}.{p}" for f in folds for p in ("weight", "bias")}
    seen: set[int] = set()
    for name, tensor in named.items():
        if id(tensor) in parameters and id(tensor) not in seen and name not in lost:
            seen.add(id(tensor))
            roots = graph.analysis.dims.roots
            costs.add(1, [(roots.get((name, a), {}), n) for a, n in enumerate(tensor.shape)])
    for fold in folds:
        mean = f"{fold.batch_norm}.running_mean"
        if fold_names(fold)[1] not in named:
            costs.add(1, [(graph.analysis.dims.roots.get((mean, 0), {}), named[mean].shape[0])])
    return costs
