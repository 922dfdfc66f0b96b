"""Latency as a cost of widths: every computation looked up in the table, corrected by what the whole network showed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import Any

import numpy as np
from torch import fx

from ...dependency import DependencyGraph
from ...dependency.axes import Axes, Floats, ProductCosts, axes_of
from ...dependency.state import Mask
from ...tracing.names import operator_name
from .context import Context
from .table import LatencyTable, Surface
from .units import Unit, units_of

# Functions that cost several times what an addition costs, per element.
_DEAR = frozenset("gelu silu sigmoid tanh exp erf softmax _softmax hardswish mish log pow".split())
_WEIGHT = 4.0


@dataclasses.dataclass(frozen=True, eq=False)
class _Term:
    unit: Unit
    surface: Surface
    factor: float

    @functools.cached_property
    def groups(self) -> tuple[int, ...]:
        return tuple(sorted(self.unit.groups))


def running(graph: DependencyGraph) -> list[fx.Node]:
    """The recorded calls that the model makes in eval mode, in order."""
    recorded = graph.trace.graph
    output = next(n for n in recorded.nodes if n.op == "output")
    todo = list(output.all_input_nodes[: graph.trace.outputs or None])
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return [n for n in recorded.nodes if n in seen]


class LatencyCosts:
    """Seconds of one call of the pruned network."""

    def __init__(self, graph: DependencyGraph, table: LatencyTable, context: Context) -> None:
        self.axes = Axes(graph)
        units, light = units_of(running(graph), self.axes)
        surfaces = [table.surface(u.kernel, u.sample.lengths, tuple(bool(n.groups) for n in u.lengths)) for u in units]
        self._terms = [_Term(u, s, context.factor(u.sample)) for u, s in zip(units, surfaces, strict=True)]
        self._elements = ProductCosts(graph, self.axes)
        for node in light:
            if hasattr(node.meta.get("val"), "shape"):
                self._elements.add(_WEIGHT if operator_name(node) in _DEAR else 1.0, axes_of(graph, node))
        heavy = sum(t.factor * float(t.surface(t.unit.sample.lengths)) for t in self._terms)
        self.heavy, self.elements = heavy, self._elements.full  # what the context's shares are of
        self.calls = len(units) + len(light)
        scale = (context.wall - context.fixed) / max(heavy + context.light, 1e-12)
        self._terms = [dataclasses.replace(t, factor=scale * t.factor) for t in self._terms]
        self._light = scale * context.light / self._elements.full if self._elements.full else 0.0
        self.constant = context.fixed + (0.0 if self._light else scale * context.light)
        self._by_group: dict[int, list[_Term]] = {}
        for term in self._terms:
            for g in term.unit.groups:
                self._by_group.setdefault(g, []).append(term)
        self._values: dict[tuple[Any, ...], float] = {}
        self._curves: dict[tuple[Any, ...], Floats] = {}
        self._whole_curves: dict[tuple[Any, ...], Floats] = {}
        self._partners: dict[int, list[int]] = {}

    @property
    def full(self) -> float:
        return self.value(np.ones(len(self.axes.graph.groups)))

    def value(self, kept: Floats) -> float:
        fractions = kept.tolist()
        heavy = sum(self._at(t, fractions) for t in self._terms)
        return float(self.constant + heavy + self._light * self._elements.value(kept))

    def _at(self, term: _Term, kept: list[float]) -> float:
        key = (id(term), *(kept[g] for g in term.groups))
        if key not in self._values:
            lengths = [n.value(kept) for n in term.unit.lengths]
            self._values[key] = term.factor * float(term.surface(lengths))
        return self._values[key]

    def exact(self, gone: Mask) -> float:
        heavy = sum(
            t.factor * float(t.surface([n.exact(self.axes, gone) for n in t.unit.lengths])) for t in self._terms
        )
        return self.constant + heavy + self._light * self._elements.exact(gone)

    def curve(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        key = (group, kept[self._beside(group)].tobytes(), fractions.tobytes())
        if key not in self._whole_curves:
            elements = self._light * self._elements.curve(group, kept, fractions)
            self._whole_curves[key] = self.stairs(group, kept, fractions) + elements
        return self._whole_curves[key]

    def partners(self, group: int) -> Set[int]:
        return frozenset(self._beside(group))

    def _beside(self, group: int) -> list[int]:
        if group not in self._partners:
            terms = self._by_group.get(group, ())
            found = self._elements.partners(group) | frozenset[int]().union(*(t.unit.groups for t in terms))
            self._partners[group] = sorted(found - {group})
        return self._partners[group]

    def stairs(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        """The part of `curve` that computations take: where it does not fall, a width is not worth having, though
        functions of single elements would get cheaper."""
        varied: list[Any] = list(kept)
        varied[group] = fractions
        out = np.zeros(len(fractions))
        for term in self._by_group.get(group, ()):
            others = tuple(float(kept[g]) for g in term.groups if g != group)
            key = (id(term), group, others, fractions.tobytes())
            if key not in self._curves:
                lengths = [n.value(varied) for n in term.unit.lengths]
                self._curves[key] = term.factor * term.surface(lengths)
            out = out + self._curves[key]
        return out

    def slopes(self, kept: Floats) -> Floats:
        """What the last tenth of each group costs, per fraction: stairs have no slope of their own."""
        out = np.zeros(len(kept))
        for g in range(len(kept)):
            low, high = max(0.0, float(kept[g]) - 0.1), float(kept[g])
            if high > low:
                at = self.curve(g, kept, np.array([low, high]))
                out[g] = (at[1] - at[0]) / (high - low)
        return out
