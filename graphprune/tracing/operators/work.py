"""The work of calls: multiply-accumulates, as sums of products of the lengths of tensors' axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from .products import Product, positions, shape_of

Place = tuple[fx.Node, int]


class Loop(NamedTuple):
    """`length` steps along an axis. `places`: the tensors that the axis is one of, (recorded tensor, axis from 0)
    each; of a call with several results the first one is meant. Of an axis that is removed in one, the others lose as
    much."""

    length: int
    places: tuple[Place, ...]


Term = tuple[Loop, ...]
"""Loops inside one another, with one multiplication and addition inside all of them."""

Work = Callable[["Call"], tuple[Term, ...]]


class Call:
    """The tensors and numbers that one recorded call was given."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self._positions = positions(node.target)

    def has(self, name: str) -> bool:
        """Whether the operator takes an argument of that name."""
        return name in self._positions

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of that name in the operator's schema, however it was passed."""
        node = self.node
        if name in node.kwargs:
            return node.kwargs[name]
        if name == "self" and "input" in node.kwargs:  # what Python calls it
            return node.kwargs["input"]
        position = self._positions.get(name, len(node.args))
        return node.args[position] if position < len(node.args) else default

    @property
    def names(self) -> list[str]:
        """The names of its arguments, in order."""
        return list(self._positions)


def along(*places: tuple[Any, int]) -> Loop:
    """The loop along an axis of a tensor, and where else that axis is found; negative axes count from the end. A place
    where the axis has another length (it is broadcast there) is none."""
    length = shape_of(places[0][0])[places[0][1]]
    found = []
    for tensor, axis in places:
        shape = shape_of(tensor)
        if -len(shape) <= axis < len(shape) and shape[axis] == length:
            found.append((tensor, axis % len(shape)))
    return Loop(length, tuple(found))


def _every(node: Any, *without: int) -> Term:
    """Loops along the axes of a tensor, but for some."""
    shape = shape_of(node)
    return tuple(Loop(n, ((node, a),)) for a, n in enumerate(shape) if a not in without)


def work_of_matrices(left: str) -> Callable[[Call], tuple[Term, ...]]:
    """Every element of the result is a sum over the last axis of the operand `left`, times the operand after it."""

    def rule(call: Call) -> tuple[Term, ...]:
        a = call.argument(left)
        names = call.names
        b = call.argument(names[names.index(left) + 1])
        inner = -1 if len(shape_of(b)) == 1 else -2
        return ((*_every(call.node), along((a, -1), (b, inner))),)

    return rule


def work_of_linear(call: Call) -> tuple[Term, ...]:
    """Weight (out, in), or (in,)."""
    return ((*_every(call.node), along((call.argument("input"), -1), (call.argument("weight"), -1))),)


def work_of_addbmm(call: Call) -> tuple[Term, ...]:
    """Products of matrices, summed over the batch too."""
    a, b = call.argument("batch1"), call.argument("batch2")
    batch, inner = along((a, 0), (b, 0)), along((a, 2), (b, 1))
    return ((batch, along((call.node, 0), (a, 1)), inner, along((call.node, 1), (b, 2))),)


def work_of_grouped_mm(call: Call) -> tuple[Term, ...]:
    """(g, m, k) x (g, k, n); with a 2-d operand one of its axes is shared out among the groups."""
    a, b = call.argument("self"), call.argument("mat2")
    both = len(shape_of(a)) == len(shape_of(b)) == 3
    lead = (along((a, 0), (b, 0)),) if both else ()
    return ((*lead, along((a, -2), (call.node, -2)), along((a, -1), (b, -2)), along((b, -1), (call.node, -1))),)


def work_of_convolution(call: Call) -> tuple[Term, ...]:
    """Weight (out, in / groups, kernel), transposed: (in, out / groups, kernel)."""
    weight = call.argument("weight")
    sites = call.argument(call.names[0]) if call.argument("transposed", False) else call.node
    return ((*_every(sites, 1), *_every(weight)),)


def work_of_conv_tbc(call: Call) -> tuple[Term, ...]:
    """Data (steps, batch, in), weight (kernel, in, out)."""
    data, weight = call.argument("self"), call.argument("weight")
    inner, outer = along((weight, 1), (data, 2)), along((weight, 2), (call.node, 2))
    return ((*_every(call.node, 2), along((weight, 0)), inner, outer),)


def work_of_deform_conv(call: Call) -> tuple[Term, ...]:
    """The whole weight for every place of the result."""
    return ((*_every(call.node, 1), *_every(call.argument("weight"))),)


def work_of_attention(call: Call) -> tuple[Term, ...]:
    """Query (..., L, E), key (..., S, E), value (..., S, V): scores are L x S sums over E, results L x V over S."""
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    rank = len(shape_of(call.node))
    scores = (*(along((call.node, a), (query, a)) for a in range(rank - 1)), along((key, -2), (value, -2)))
    return (*scores, along((query, -1), (key, -1))), (*scores, along((value, -1), (call.node, -1)))


def work_of_recurrent(call: Call) -> tuple[Term, ...]:
    """Every matrix of weights is multiplied with one vector per step and sequence; gates multiply single elements."""
    data = call.argument("data" if call.has("data") else "input")
    steps = _every(data, len(shape_of(data)) - 1)
    return tuple((*steps, *_every(w)) for w in call.argument("params") if len(shape_of(w)) == 2)


def work_of_trilinear(call: Call) -> tuple[Term, ...]:
    """sum(i1 * i2 * i3) over `sumdim`, where each operand lacks the axes in its expand list: as torch does it, first
    i1 with i2, summed over what i3 lacks, then with i3."""
    operands = [call.argument(name) for name in ("i1", "i2", "i3")]
    rank = len(shape_of(operands[0])) + len(call.argument("expand1"))
    lacking = [{int(d) % rank for d in call.argument(f"expand{i}")} for i in (1, 2, 3)]
    summed = {int(d) % rank for d in call.argument("sumdim")}
    places: list[list[tuple[Any, int]]] = [[] for _ in range(rank)]
    for operand, missing in zip(operands, lacking, strict=True):
        for axis, joint in enumerate(a for a in range(rank) if a not in missing):
            places[joint].append((operand, axis))
    for found in places:  # the length is that of the operands which are not broadcast
        found.sort(key=lambda place: -shape_of(place[0])[place[1]])
    joint_loops = [along(*found) for found in places]
    first = tuple(joint_loops[a] for a in range(rank) if a not in lacking[0] or a not in lacking[1])
    second = tuple(joint_loops[a] for a in range(rank) if a not in summed or a not in lacking[2])
    return first, second


def work_of_product(node: fx.Node, product: Product) -> Term:
    """As a layer or a convolution has it: the whole weight, for every place of the result; of a transposed one, for
    every place of the data."""
    data, weight = product.data, product.weight
    sites, channels = (data, product.data_axis) if product.transposed else (node, product.result_axis)
    loops = list(_every(sites, *(() if channels is None else (channels,))))
    for axis in range(len(shape_of(weight))):
        if axis in product.reads and product.data_axis is not None:
            loops.append(along((weight, axis), (data, product.data_axis)))
        elif axis in product.produces and product.result_axis is not None:
            loops.append(along((weight, axis), (node, product.result_axis)))
        elif axis not in product.batch:
            loops.append(along((weight, axis)))
    return tuple(loops)
