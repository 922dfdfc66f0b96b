"""What the rule of a user's operator says that a call multiplies with what.

The rule is tried on coordinates of the call's own: every axis of every operand is a Dim by itself, whatever the network
around it. What it declares with `reads` and `produces`, ties and returns tells the weights, the data and their axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from torch import fx

from ..tracing.operators import Product, shape_of
from ..tracing.recorder import TensorMeta
from .context import NodeContext, Result
from .dims import DimTable, Root
from .rules.registry import Rule
from .state import AxisMap, State

# Every pass factors at least one Dim of an operand.
_MAX_PASSES = 16


def declared_products(rule: Rule, node: fx.Node) -> tuple[Product, ...]:
    """The products of one call of a user's operator; none where its rule declares no weight, or fails on such
    coordinates: the analysis, which runs it on the network's, says then what is wrong."""
    dims = DimTable()
    try:
        for _ in range(_MAX_PASSES):
            trial = _Trial(node, dims)
            result = rule(trial)
            if not trial.effects.refines:
                return _products(trial, result)
            for request in trial.effects.refines:
                if dims.size[request.dim]:
                    dims.refine(request)
    except Exception:  # a user's code
        return ()
    return ()


class _Lone(AxisMap):
    """The coordinates of an axis of length 1, of which there are none; it is known which axis it was."""

    root: Root


class _Whole(State):
    """An operand, each axis of which can be told by its coordinates."""

    __slots__ = ("name",)
    name: str

    def axis(self, axis: int) -> AxisMap:
        found = super().axis(axis)
        if not found and self.shape and self.shape[axis] == 1:
            found = _Lone()
            found.root = (self.name, axis % len(self.shape))
        return found


class _Trial(NodeContext):
    """One run of the rule. `ties`: the axes that it ties."""

    def __init__(self, node: fx.Node, dims: DimTable) -> None:
        super().__init__(node, {}, dims)
        self.operands = {operand.name: operand for operand in node.all_input_nodes}
        self.ties: list[tuple[frozenset[Root], frozenset[Root]]] = []
        self.sides: dict[str, list[frozenset[Root]]] = {"reads": [], "produces": []}
        for operand in node.all_input_nodes:
            self.env[operand] = self._coordinates(operand)

    def _coordinates(self, node: fx.Node) -> State:
        meta = node.meta.get("val")
        shape = shape_of(node)
        axes: dict[int, AxisMap] = {}
        if isinstance(meta, TensorMeta) and (meta.dtype.is_floating_point or meta.dtype.is_complex):
            axes = {a: self.dims.add_root(node.name, a, n) for a, n in enumerate(shape) if n > 1}
        state = _Whole(shape, axes)
        state.name = node.name
        return state

    def roots(self, axis_map: AxisMap) -> frozenset[Root]:
        """The axes that coordinates are of."""
        if isinstance(axis_map, _Lone):
            return frozenset((axis_map.root,))
        return frozenset(self.dims.root_of[dim] for dim in axis_map)

    def tie(self, a: AxisMap, b: AxisMap, length: int, what: str | Callable[[], str] = "") -> None:
        self.ties.append((self.roots(a), self.roots(b)))
        super().tie(a, b, length, what)

    def reads(self, axis_map: AxisMap) -> None:
        super().reads(axis_map)
        self.sides["reads"].append(self.roots(axis_map))

    def produces(self, axis_map: AxisMap) -> None:
        super().produces(axis_map)
        self.sides["produces"].append(self.roots(axis_map))

    def tied_to(self, roots: Iterable[Root]) -> set[Root]:
        """The axes that are tied to one of these at once."""
        mine = set(roots)
        found = {r for a, b in self.ties for one, other in ((a, b), (b, a)) if mine & one for r in other}
        return found - mine

    def length(self, root: Root) -> int:
        return shape_of(self.operands[root[0]])[root[1]]


def _products(trial: _Trial, result: Result) -> tuple[Product, ...]:
    said = {side: frozenset[Root]().union(*roots) for side, roots in trial.sides.items()}
    weights = dict.fromkeys(name for name in trial.operands if any(r[0] == name for r in said["produces"]))
    return tuple(_product(trial, result, name, said["reads"], said["produces"]) for name in weights)


def _product(
    trial: _Trial, result: Result, weight: str, reads: frozenset[Root], produces: frozenset[Root]
) -> Product:
    read = sorted(r for r in reads - produces if r[0] == weight)
    made = sorted(r for r in produces if r[0] == weight)
    bias = next((r[0] for r in sorted(trial.tied_to(made)) if _is_bias(trial, r, weight)), None)
    result_axis = _result_axis(trial, result, made)
    data, data_axis = _data(trial, weight, bias, read, made, result_axis)
    batch, slides = _other_axes(trial, result, weight, {*read, *made})
    product = Product(
        data=trial.operands[data],
        weight=trial.operands[weight],
        produces=tuple(axis for _, axis in made),
        reads=tuple(axis for _, axis in read),
        data_axis=data_axis,
        result_axis=result_axis,
        bias=None if bias is None else trial.operands[bias],
        slides=slides,
        batch=batch,
    )
    return _in_groups(trial, product)


def _is_bias(trial: _Trial, root: Root, weight: str) -> bool:
    return root[0] != weight and root[0] in trial.operands and len(shape_of(trial.operands[root[0]])) == 1


def _data(
    trial: _Trial, weight: str, bias: str | None, read: list[Root], made: list[Root], result_axis: int | None
) -> tuple[str, int | None]:
    """What is multiplied with the weight, and the axis that is tied to the one that reads; where that has one index,
    or one for each group, it is the axis that lies where the result's does."""
    others = [name for name in trial.operands if name not in (weight, bias)]
    for roots in (read, made):
        found = [r for r in sorted(trial.tied_to(roots)) if r[0] in others]
        if found:
            return found[0]
    data = next((n for n in others if isinstance(trial.env[trial.operands[n]], State)), weight)
    rank, made_rank = len(shape_of(trial.operands[data])), len(shape_of(trial.node))
    alike = result_axis is not None and result_axis - made_rank + rank >= 0
    return data, result_axis - made_rank + rank if alike and result_axis is not None else None


def _first(result: Result) -> State | None:
    return result[0] if isinstance(result, list) else result


def _result_axis(trial: _Trial, result: Result, made: list[Root]) -> int | None:
    state = _first(result)
    if state is None or isinstance(result, list):
        return None
    for roots in (set(made), trial.tied_to(made)):
        found = [a for a, axis_map in state.axes.items() if roots & trial.roots(axis_map)]
        if found:
            return found[0] if len(found) == 1 else None
    single = [a for a, n in enumerate(state.shape) if n == 1]
    return single[-1] if single and all(trial.length(r) == 1 for r in made) else None


def _other_axes(
    trial: _Trial, result: Result, weight: str, sides: set[Root]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the weight that are neither read nor produced: those that data or result have too, and those of a
    kernel."""
    state = _first(result)
    seen = frozenset[Root]().union(*(trial.roots(m) for m in state.axes.values())) if state is not None else frozenset()
    rest = [(weight, a) for a in range(len(shape_of(trial.operands[weight]))) if (weight, a) not in sides]
    shared = {r for r in rest if r in seen or trial.tied_to([r])}
    return tuple(a for _, a in rest if (weight, a) in shared), tuple(a for _, a in rest if (weight, a) not in shared)


def _in_groups(trial: _Trial, product: Product) -> Product:
    """Of a weight laid out as a convolution's, (out, in, kernel), or (in, out, kernel) for a transposed one, an axis of
    which counts inside one group."""
    weight = shape_of(product.weight)
    turned = bool(product.slides) and (product.reads, product.produces) == ((0,), (1,))
    if turned and product.result_axis is not None:
        whole, part = shape_of(trial.node)[product.result_axis], weight[1]
    elif product.data_axis is not None and not turned:
        whole, part = shape_of(product.data)[product.data_axis], math.prod(weight[a] for a in product.reads)
    else:
        whole = part = 1
    return dataclasses.replace(product, transposed=turned, groups=max(whole // part, 1) if part else 1)


__all__ = ["declared_products"]
