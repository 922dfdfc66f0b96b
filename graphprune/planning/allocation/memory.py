"""Memory as a cost of widths: weights, and the activations that are alive at the same time."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from torch import fx, nn

from ...dependency import DependencyGraph
from ...dependency.axes import Axes, Axis, Floats
from ...dependency.state import Mask
from ...plans.surgery import Fold
from ...support.walking import named_tensors
from ...tracing.names import operator_name
from ...tracing.operators import operator_of
from ...tracing.recorder import TensorMeta
from ...tracing.work import runs_in_eval
from .costs import parameter_costs


class MemoryCosts:
    """Bytes of the parameters and of the activations of a run that frees every tensor after its last use, at their
    highest. Views cost nothing; what an operator needs for itself is not counted. Buffers count as they are; what is
    computed from weights alone counts as any other result."""

    def __init__(self, graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> None:
        self._axes = Axes(graph)
        self._weights = parameter_costs(graph, model, folds)
        tensors = named_tensors(model)
        self._bytes = max((p.element_size() for p in model.parameters()), default=4)
        parameters = {id(p) for p in model.parameters()}
        self._fixed = float(sum(t.numel() * t.element_size() for t in tensors.values() if id(t) not in parameters))
        results, self._alive = _lifetimes(graph.trace.graph)
        self._shapes: list[tuple[float, tuple[Axis, ...]]] = []
        for node, index in results:
            meta = node.meta["val"] if index is None else node.meta["val"][index]
            axes = self._axes.of(node, index or 0)
            free = tuple(a for a in axes if a.groups)
            rest = math.prod(a.length for a in axes if not a.groups)
            self._shapes.append((float(rest * meta.dtype.itemsize), free))
        self._varying = {id(a): a for _, axes in self._shapes for a in axes}

    @property
    def full(self) -> float:
        return self.value(np.ones(len(self._axes.graph.groups)))

    def value(self, kept: Floats) -> float:
        activations = self._activations({k: float(a.value(kept)) for k, a in self._varying.items()})
        return self._fixed + self._bytes * self._weights.value(kept) + float(activations.max(initial=0.0))

    def exact(self, gone: Mask) -> float:
        activations = self._activations({k: self._axes.exact(a, gone) for k, a in self._varying.items()})
        return self._fixed + self._bytes * self._weights.exact(gone) + float(activations.max(initial=0.0))

    def curve(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        varied: list[Any] = list(kept)
        varied[group] = fractions
        activations = self._activations({k: a.value(varied) for k, a in self._varying.items()}, len(fractions))
        total: Floats = self._bytes * self._weights.curve(group, kept, fractions) + activations.max(0, initial=0.0)
        return total

    def partners(self, group: int) -> Set[int]:
        """All: any of them can be alive at the highest moment."""
        return frozenset(range(len(self._axes.graph.groups))) - {group}

    def slopes(self, kept: Floats) -> Floats:
        """At the moment when most is alive."""
        lengths = {k: float(a.value(kept)) for k, a in self._varying.items()}
        out: Floats = self._bytes * self._weights.slopes(kept)
        if not self._shapes:
            return out
        moment = int(self._activations(lengths).argmax())
        for i in self._alive[moment].indices:
            factor, axes = self._shapes[i]
            for j, axis in enumerate(axes):
                rest = factor * math.prod(lengths[id(b)] for k, b in enumerate(axes) if k != j)
                for g, slope in axis.slope(kept).items():
                    out[g] += rest * slope
        return out

    def _activations(self, lengths: dict[int, Any], columns: int | None = None) -> Floats:
        """Bytes alive at every moment; with lengths that are arrays, in as many columns."""
        sizes = [factor * math.prod(lengths[id(a)] for a in axes) for factor, axes in self._shapes]
        if columns is not None:
            sizes = [np.broadcast_to(s, (columns,)) for s in sizes]
        found: Floats = self._alive @ np.array(sizes, np.float64).reshape(len(sizes), *([columns] if columns else []))
        return found


_Result = tuple[fx.Node, int | None]  # of several results, which


def _lifetimes(graph: fx.Graph) -> tuple[list[_Result], csr_matrix]:
    """The new tensors that calls in eval mode make, and which of them are alive at each call (a row per call)."""
    made: list[_Result] = []
    born: list[int] = []
    last: list[int] = []
    held: dict[fx.Node, list[int | None]] = {}  # where each of a call's results lies, as a place in `made`
    time = -1
    for time, node in enumerate(graph.nodes):
        if not runs_in_eval(node) and node.op != "output":
            continue
        source = _looked_at(node)
        if node.target is operator.getitem and source is None:  # one of several new tensors
            places = held.get(node.args[0], [])
            held[node] = places[node.args[1] : node.args[1] + 1]
            read = [held[node]]
        else:
            read = [held[n] for n in node.all_input_nodes if n in held]
        for place in (p for places in read for p in places if p is not None):
            last[place] = time
        if source is not None and source in held:
            held[node] = held[source]
        elif source is None and node.target is not operator.getitem:
            held[node] = []
            for index, meta in _results(node):
                held[node].append(len(made) if isinstance(meta, TensorMeta) else None)
                if isinstance(meta, TensorMeta):
                    made.append((node, index))
                    born.append(time)
                    last.append(time)
    rows = [t for first, end in zip(born, last, strict=True) for t in range(first, end + 1)]
    columns = [i for i, (first, end) in enumerate(zip(born, last, strict=True)) for _ in range(first, end + 1)]
    return made, csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(time + 1, len(made)))


def _results(node: fx.Node) -> list[tuple[int | None, Any]]:
    meta = node.meta.get("val")
    return list(enumerate(meta)) if isinstance(meta, tuple) else [(None, meta)]


def _looked_at(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a call's result lies in."""
    if node.op != "call_function":
        return None
    name = operator_name(node)
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if first is None:
        return None
    if name == "getitem":
        return first if _is_view(first) else None
    in_place = name.endswith("_") and not name.startswith("_")
    return first if in_place or _is_view(node) else None


def _is_view(node: fx.Node) -> bool:
    found = operator_of(node)
    return found is not None and found.view
