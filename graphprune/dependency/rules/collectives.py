"""Calls between processes (torch.distributed): every process holds a tensor of the same channels.

Sums and copies change values and no places. What is gathered from all processes, or scattered over them, lies along the
first axis, of which nothing goes.
"""

from __future__ import annotations

from torch import fx

from ..context import NodeContext, Result
from ..state import State
from .registry import empty, rule
from .scattering import WRITTEN

_BETWEEN = "gathered from or scattered over processes along this axis"


@rule("c10d::allreduce_", "c10d::broadcast_")
def in_place(context: NodeContext) -> Result:
    """Lists of tensors, written in place: what reads them reads on where they were made."""
    return empty(context)


@rule(
    "_c10d_functional::all_reduce", "_c10d_functional::all_reduce_", "_c10d_functional::broadcast",
    "_c10d_functional::broadcast_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd",
)  # fmt: skip
def same_places(context: NodeContext) -> Result:
    return State(context.shape, context.state(context.arg(0)).axes)


@rule("_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor")
def along_the_first_axis(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    context.freeze(state.axis(0), "operator", _BETWEEN)
    return State(context.shape, {axis: axis_map for axis, axis_map in state.axes.items() if axis})


@rule("c10d::allgather_")
def gathered(context: NodeContext) -> Result:
    """One tensor of every process's shape for each of them."""
    for parts, source in zip(context.arg(0), context.arg(1), strict=True):
        for part in parts:
            _tie(context, part, source, 0)
    return empty(context)


@rule("c10d::_allgather_base_")
def gathered_into_one(context: NodeContext) -> Result:
    out, source = context.arg(0), context.arg(1)
    for state in (context.state(out), context.state(source)):
        context.freeze(state.axis(0), "operator", _BETWEEN)
    _tie(context, out, source, 1)
    written = context.state(out)
    return [State(written.shape, {axis: axis_map for axis, axis_map in written.axes.items() if axis}), None]


def _tie(context: NodeContext, out: fx.Node, source: fx.Node, first: int) -> None:
    """From this axis on, both lose the same indices."""
    mine, theirs = context.state(out), context.state(source)
    for axis in range(first, max(len(mine.shape), len(theirs.shape))):
        if mine.shape[first:] == theirs.shape[first:]:
            context.tie(mine.axis(axis), theirs.axis(axis), mine.shape[axis], WRITTEN)
        else:
            context.freeze(mine.axis(axis), "operator", _BETWEEN)
            context.freeze(theirs.axis(axis), "operator", _BETWEEN)
