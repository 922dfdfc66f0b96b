"""Rule kind 1, continued: an index tensor says along one axis where elements come from or go to.

Messages between the nodes of a graph, tokens sent to experts. Along the axis of the index positions have no name that
code could follow, so they stay; along all other axes everything that takes part loses the same indices.
"""

from __future__ import annotations

import math

from torch import fx

from ...tracing.names import operator_name
from ...tracing.operators import Kind, Move, operator_of
from ..context import NodeContext, Result
from ..state import AxisMap, State, axis_of
from .registry import rule

WRITTEN = "written into a tensor whose channels cannot be removed"
_PICKED, _PLACED = "picked by an index tensor", "written to by an index tensor"
_USED = "used as an index"


@rule("gather")
def gather(context: NodeContext) -> Result:
    """out[i, j] = x[index[i, j], j] along axis 0: along the other axes the index loses what x loses, if it can."""
    state, index = context.state(context.arg(0)), context.state(context.arg(2, "index"))
    dim = axis_of(context.arg(1, "dim"), len(state.shape))
    context.freeze(state.axis(dim), "index", _PICKED)
    context.freeze(index.axis(dim), "index", _USED)
    return State(context.shape, _beside(context, dim, [state, index], "picked by an index tensor whose size stays"))


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(context: NodeContext) -> Result:
    """x[index[i, j], j] = or += source[i, j] along axis 0; the source may be one number for all."""
    state, index = context.state(context.arg(0)), context.state(context.arg(2, "index"))
    source = context.arg(3, "src")
    operands = [state, index, *([context.state(source)] if _has_axes(source) else [])]
    dim = axis_of(context.arg(1, "dim"), len(state.shape))
    for operand in operands:
        context.freeze(operand.axis(dim), "index", _USED if operand is index else _PLACED)
    return State(context.shape, _beside(context, dim, operands, "scattered by an index tensor whose size stays"))


@rule(
    "index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_", "index_fill",
    "index_fill_",
)  # fmt: skip
def index_write(context: NodeContext) -> Result:
    """Slices of a source are written to chosen indices of one axis, or one number for all of them."""
    state, source = context.state(context.arg(0)), context.arg(3, "source")
    operands = [state, *([context.state(source)] if _has_axes(source) else [])]
    dim = axis_of(context.arg(1, "dim"), len(state.shape))
    context.freeze_state(context.state(context.arg(2, "index")), "index", _USED)
    for operand in operands:
        context.freeze(operand.axis(dim), "index", _PLACED)
    return State(context.shape, _beside(context, dim, operands, WRITTEN))


def _has_axes(value: object) -> bool:
    """A tensor that is more than one number."""
    return isinstance(value, fx.Node) and bool(value.meta["val"].shape)


def _beside(context: NodeContext, dim: int, operands: list[State], text: str) -> dict[int, AxisMap]:
    """What lies along the axes other than `dim`: operands that are equally long lose the same indices. Where one is
    shorter, only the first indices of the others take part, and none may go."""
    axes: dict[int, AxisMap] = {}
    for axis in range(len(operands[0].shape)):
        maps = [operand.axis(axis) for operand in operands]
        best = max(maps, key=len)
        if axis == dim or not best:
            continue
        if len({operand.shape[axis] for operand in operands}) == 1:
            for other in maps:
                context.tie(best, other, operands[0].shape[axis], text)
            axes[axis] = best
        else:
            for axis_map in maps:
                context.freeze(axis_map, "index", "only a part of the axis is reached by an index tensor")
    return axes


@rule("segment_reduce")
def segment_reduce(context: NodeContext) -> Result:
    """Rows that follow one another are added up, or the largest taken, so many at a time."""
    state, axis = context.state(context.arg(0)), int(context.arg(5, "axis", 0))
    for position, name in ((2, "lengths"), (3, "indices"), (4, "offsets")):
        context.freeze_state(context.state(context.arg(position, name)), "index", _USED)
    if axis < 0:
        axis += len(state.shape)
    for before in range(axis + 1):  # the lengths of segments have all axes before it
        context.freeze(state.axis(before), "index", "cut into segments along this axis")
    return State(context.shape, {a: m for a, m in state.axes.items() if a > axis})


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(context: NodeContext) -> Result:
    """Where a mask is true, the elements of a source in their order. Along last axes on which the mask is the same
    everywhere, whole rows are replaced by whole rows, and both lose the same indices."""
    state, source = context.state(context.arg(0)), context.state(context.arg(2, "source"))
    mask, shape = context.arg(1, "mask"), context.shape
    rows = _last_axes_alike(mask, len(shape))
    row = shape[len(shape) - rows :]
    if state.shape != shape or math.prod(source.shape) % math.prod(row):
        rows, row = 0, ()
    laid = context.reshape(source, (math.prod(source.shape) // math.prod(row), *row))
    axes = _tie_rows(context, [state, laid], mask, rows)
    for operand, text in ((state, _BY_MASK), (laid, "written where a mask is true")):
        _freeze_before(context, operand, rows, text)
    return State(shape, axes)


@rule("masked_select")
def masked_select(context: NodeContext) -> Result:
    """The elements where a mask is true, one after the other: whole rows along last axes on which it is the same."""
    state, mask = context.state(context.arg(0)), context.arg(1, "mask")
    rows = _last_axes_alike(mask, len(state.shape))
    if len(mask.meta["val"].shape) > len(state.shape):
        rows = 0
    row = state.shape[len(state.shape) - rows :]
    axes = _tie_rows(context, [state], mask, rows)
    _freeze_before(context, state, rows, _BY_MASK)
    laid = (context.shape[0] // math.prod(row), *row)
    return context.reshape(State(laid, {a - len(state.shape) + len(laid): m for a, m in axes.items()}), context.shape)


_BY_MASK = "picked by a mask"


def _tie_rows(context: NodeContext, operands: list[State], mask: fx.Node, rows: int) -> dict[int, AxisMap]:
    """Along so many last axes the operands lose the same indices, and the mask where it is as long. By axis of the
    first operand."""
    axes: dict[int, AxisMap] = {}
    for back in range(1, rows + 1):
        maps = [operand.axis(-back) for operand in operands]
        if _length(mask, back) > 1:
            maps.append(context.state(mask).axis(-back))
        axes[len(operands[0].shape) - back] = best = max(maps, key=len)
        for other in maps:
            context.tie(best, other, operands[0].shape[-back], WRITTEN)
    return axes


def _freeze_before(context: NodeContext, state: State, rows: int, text: str) -> None:
    for axis, axis_map in state.axes.items():
        if axis < len(state.shape) - rows:
            context.freeze(axis_map, "index", text)


def _length(value: fx.Node, back: int) -> int:
    """Of an axis counted from the last one, 1 where there is none: it is broadcast."""
    shape = value.meta["val"].shape
    return int(shape[-back]) if back <= len(shape) else 1


def _last_axes_alike(mask: fx.Node, ndim: int) -> int:
    """Along how many of the last axes a mask is the same everywhere, whatever its values."""
    return next((back - 1 for back in range(1, ndim + 1) if not _alike(mask, back)), ndim)


def _alike(value: fx.Node, back: int) -> bool:
    todo = [value]
    while todo:
        node = todo.pop()
        if _length(node, back) == 1:
            continue
        if (operator_name(node) not in _STRETCHES and not _keeps_places(node)) or _is_written_to(node):
            return False
        todo += node.all_input_nodes
    return True


_STRETCHES = frozenset(("expand", "expand_copy", "repeat"))


def _keeps_places(node: fx.Node) -> bool:
    operator = operator_of(node)
    return operator is not None and (operator.kind is Kind.POINTWISE or operator.move is Move.STAYS)


def _is_written_to(node: fx.Node) -> bool:
    """Some call writes into it, perhaps through a view."""
    for user in node.users:
        if getattr(getattr(user.target, "_schema", None), "is_mutable", False) and user.args[:1] == (node,):
            return True
        operator = operator_of(user)
        if operator is not None and operator.view and _is_written_to(user):
            return True
    return False
