"""Rule kind 1, continued: parts of an axis - slices, splits, single indices, index tensors, rolls.

Here the user's code says where one part ends and the next begins, and those bounds must still be right afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import fx

from ...tracing.operators import Move, operator_of
from ...tracing.origin import Expr, Literal, Operation, evaluate, recorded_value
from ..context import NodeContext, Result
from ..state import AxisMap, State, axis_of, take
from .registry import empty, rule
from .scattering import WRITTEN


def _entry(context: NodeContext, dim: int, kind: str) -> tuple[Any, ...] | None:
    """What the user wrote for the axis that this slice or select works on.

    Indexing works through the brackets from left to right: an integer removes the current axis, everything else moves
    on to the next.
    """
    sizes = context.sizes
    if sizes is None or sizes.kind != "index":
        return None
    current = 0
    for entry in sizes.values:
        if entry[0] == kind and current == dim and (kind != "int" or _agrees(context, entry[1])):
            return tuple(entry)
        current += entry[0] != "int"
    return None


def _agrees(context: NodeContext, expr: Expr) -> bool:
    index = context.arg(2, "index")
    value = _value(expr)
    return value is None or value == index or value + context.state(context.arg(0)).shape[context.arg(1)] == index


def _value(expr: Expr) -> int | None:
    return int(expr.value) if isinstance(expr, Literal) else None


@rule("slice", "slice_copy")
def slice_(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    dim = axis_of(context.arg(1, "dim", 0), n)
    length = state.shape[dim]
    start, stop, step = slice(context.arg(2, "start"), context.arg(3, "end"), context.arg(4, "step", 1)).indices(length)
    axis_map = state.axis(dim)
    entry = _entry(context, dim, "slice")
    if axis_map and ((start, stop, step) != (0, length, 1) or (entry is not None and len(entry) > 3)):
        if step != 1:
            context.freeze(axis_map, "stride", "indices are taken in steps along this axis")
        else:
            _slice_bounds(context, axis_map, length, dim, start, stop)
    elif not axis_map:
        _unfollowed_bounds(context, dim, length, start, stop)
    return state.with_axis(dim, context.shape[dim], take(axis_map, slice(start, stop, step)))


def _slice_bounds(context: NodeContext, axis_map: AxisMap, length: int, dim: int, start: int, stop: int) -> None:
    sizes = context.sizes
    exact = False
    if sizes is not None and sizes.kind == "chunks":  # tensor_split into a number of parts
        context.require_equal(axis_map, length, round(length / max(stop - start, 1)), "split into equal parts")
        return
    if sizes is not None and sizes.kind == "boundaries":
        lookup = {_concrete(e): e for e in sizes.values}
        low, high = lookup.get(start, Literal(start)), lookup.get(stop, Literal(stop))
    else:
        entry = _entry(context, dim, "slice")
        if entry is None:
            low, high = Literal(start), Literal(stop)
        else:
            low, high = entry[1] or Literal(0), entry[2]
            exact = len(entry) > 3
    if start > 0:
        _boundary(context, axis_map, length, low, start)
    if (stop < length or exact) and high is not None:
        _boundary(context, axis_map, length, high, stop)


def _unfollowed_bounds(context: NodeContext, dim: int, length: int, start: int, stop: int) -> None:
    """No channels on this axis, but the bounds may be computed from numbers that change."""
    entry = _entry(context, dim, "slice")
    if entry is None:
        return
    for expr, value in ((entry[1], start), (entry[2], stop)):
        if expr is not None and not isinstance(expr, Literal) and 0 < value < length:
            _boundary(context, {}, length, expr, value)


def _boundary(context: NodeContext, axis_map: AxisMap, length: int, expr: Expr, value: int) -> None:
    """A bound `value` written as `expr`: that many indices must survive before it (behind it, when negative)."""
    concrete = _concrete(expr)
    if concrete < 0:
        context.require(_negated(expr), axis_map, length, "a slice bound", (value, length))
    else:
        context.require(expr, axis_map, length, "a slice bound", (0, value))


def _negated(expr: Expr) -> Expr:
    if isinstance(expr, Literal):
        return Literal(-expr.value)
    if isinstance(expr, Operation) and expr.function == "neg":
        return expr.args[0]
    return Operation("neg", (expr,))


def _concrete(expr: Expr) -> int:
    """The value an expression had in the recorded run."""
    return int(evaluate(expr, recorded_value))


@rule("select", "select_copy")
def select(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    dim = axis_of(context.arg(1, "dim"), n)
    axis_map = state.axis(dim)
    if axis_map:
        length = state.shape[dim]
        index = axis_of(context.arg(2, "index"), length)
        context.freeze(axis_map, "selected", "one index of the axis is used by itself", slice(index, index + 1))
        entry = _entry(context, dim, "int")
        expr = entry[1] if entry else Literal(index)
        concrete = _concrete(expr)
        if concrete < 0:
            context.require(_negated(expr), axis_map, length, "an index", (index, length))
        elif index > 0:
            context.require(expr, axis_map, length, "an index", (0, index))
    return state.moved(context.shape, {a: a - (a > dim) for a in range(n) if a != dim})


@rule("unbind", "unbind_copy")
def unbind(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    dim = axis_of(context.arg(1, "dim", 0), n)
    context.freeze(state.axis(dim), "selected", "each index of the axis is used by itself")
    mapping = {a: a - (a > dim) for a in range(n) if a != dim}
    return [state.moved(s or (), mapping) for s in context.shapes]


@rule(
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "split_copy",
    "split_with_sizes_copy", "tensor_split",
)  # fmt: skip
def split(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    dim = axis_of(context.arg(2, "dim", 0), len(state.shape))
    shapes = [s for s in context.shapes if s is not None]
    axis_map, length = state.axis(dim), state.shape[dim]
    bounds = np.cumsum([0] + [s[dim] for s in shapes]).tolist()
    if axis_map and len(shapes) > 1:
        _split_sizes(context, axis_map, length, bounds)
    return [
        state.with_axis(dim, s[dim], take(axis_map, slice(lo, hi)))
        for s, lo, hi in zip(shapes, bounds[:-1], bounds[1:], strict=True)
    ]


def _split_sizes(context: NodeContext, axis_map: AxisMap, length: int, bounds: list[int]) -> None:
    sizes = context.sizes
    if sizes is None or sizes.kind == "chunks":
        context.require_equal(axis_map, length, len(bounds) - 1, "split into equal parts")
        return
    values = list(sizes.values)
    if len(values) == 1 and len(bounds) > 2:  # one size for all parts; the last may be smaller
        values = values * (len(bounds) - 2)
        context.require_equal(axis_map, length, len(bounds) - 1, "split into parts of one size")
    for expr, low, high in zip(values, bounds[:-1], bounds[1:], strict=False):
        context.require(expr, axis_map, length, "a split size", (low, high))


@rule("roll")
def roll(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    shifts, dims = context.arg(1, "shifts"), context.arg(2, "dims", ())
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        context.freeze_state(state, "mixed", "rolled across all axes")
        return empty(context)
    axes = dict(state.axes)
    sizes = context.sizes
    exprs = sizes.values if sizes is not None and sizes.kind == "shift" and len(sizes.values) == len(dims) else None
    for k, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        axis = axis_of(dim, len(state.shape))
        if axis not in axes:
            continue
        n = state.shape[axis]
        expr = exprs[k] if exprs else Literal(shift)
        if shift < 0:
            context.require(_negated(expr), axes[axis], n, "a roll", (0, -shift % n or n))
        elif shift % n:
            context.require(expr, axes[axis], n, "a roll", (n - shift % n, n))
        axes[axis] = {d: np.roll(v, shift) for d, v in axes[axis].items()}
    return State(context.shape, axes)


@rule("index_select", "take_along_dim")
def index_select(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    dim = axis_of(context.arg(1, "dim"), len(state.shape))
    index = context.state(context.arg(2, "index"))
    context.freeze_state(index, "index", "used as an index")
    context.freeze(state.axis(dim), "index", "picked by an index tensor")
    axes = {a: m for a, m in state.axes.items() if a != dim}
    if context.operation != "index_select":
        for axis_map in axes.values():
            context.freeze(axis_map, "index", "picked by an index tensor")
        axes = {}
    return State(context.shape, axes)


@rule("index_put", "index_put_")
def index_put(context: NodeContext) -> Result:
    """x[i, :, j] = values: indexed axes freeze, along the others the values lose the same indices as x."""
    state, values = context.state(context.arg(0)), context.state(context.arg(2, "values"))
    place = _picked(context, state)
    if place is None:
        context.freeze_state(values, "index", "picked by a mask")
        return empty(context)
    axes = {a: m for a, m in state.axes.items() if a in place.kept}
    for axis, position in place.kept.items():
        back = place.ndim - position
        mine, length = state.axis(axis), state.shape[axis]
        if back <= len(values.shape) and values.shape[-back] == length:
            theirs = values.axis(-back)
            context.tie(mine, theirs, length, WRITTEN)
            axes[axis] = max((mine, theirs), key=len)
    spread = {place.ndim - position for position in place.kept.values()}
    for axis in range(len(values.shape)):
        if len(values.shape) - axis not in spread:
            context.freeze(values.axis(axis), "index", "written to by an index tensor")
    return State(context.shape, axes)


@rule("index", "_unsafe_index")
def index(context: NodeContext) -> Result:
    """x[i, :, j] with index tensors: indexed axes freeze, the others keep their coordinates. Along one axis, indices
    that the code lists (`x[:, [-2]]`) hold only what they count."""
    state = context.state(context.arg(0))
    place = _picked(context, state, reading=True)
    return empty(context) if place is None else state.moved(context.shape, place.kept)


@dataclasses.dataclass(frozen=True)
class _Place:
    """x[indices] has `ndim` axes; the axes of x that no tensor indexes lie there at `kept[axis]`."""

    ndim: int
    kept: dict[int, int]


def _written_down(index: fx.Node, length: int) -> Any:
    """What must stay for indices written in the code to mean what they did, as a mask of the axis: up to the largest
    one and, for those that count from the end, from the smallest one on. None where they are not known."""
    while (found := operator_of(index)) is not None and found.move is Move.STAYS:
        index = index.all_input_nodes[0]
    value = index.meta.get("value") if "constant" in index.meta else None
    if value is None or value.dtype not in (torch.int64, torch.int32):
        return None
    numbers = value.cpu().numpy().reshape(-1)
    places = np.arange(length)
    return (places <= numbers[numbers >= 0].max(initial=-1)) | (places >= length + numbers[numbers < 0].min(initial=0))


def _picked(context: NodeContext, state: State, reading: bool = False) -> _Place | None:
    """Where the axes go that no index tensor takes; the others freeze. None for a mask that is a single truth value.

    `reading`: nothing is written, so that what lies beyond indices written in the code may go."""
    indices = context.arg(1, "indices")
    for i in indices:
        if i is not None:
            context.freeze_state(context.state(i), "index", "used as an index")
    given = [i for i in indices if i is not None]
    taken = [1 if i is None else _axes_taken(i) for i in indices]
    if 0 in taken:
        context.freeze_state(state, "index", "picked by a mask")
        return None
    starts = np.cumsum([0, *taken])
    indexed = [int(starts[k]) + a for k, i in enumerate(indices) if i is not None for a in range(taken[k])]
    for a in indexed:
        within = _written_down(given[0], state.shape[a]) if reading and len(indexed) == 1 else None
        context.freeze(state.axis(a), "index", "picked by an index tensor", within)
    width = max(1 if _is_mask(i) else len(i.meta["val"].shape) for i in given)
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    place = indexed[0] if adjacent else 0
    kept = [a for a in range(len(state.shape)) if a not in indexed]
    mapping = {}
    for k, a in enumerate(kept):
        mapping[a] = k if k < place else k + width
    return _Place(len(kept) + width, mapping)


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def _axes_taken(index: fx.Node) -> int:
    """A mask stands for as many axes as it has, an index tensor for one."""
    return len(index.meta["val"].shape) if _is_mask(index) else 1
