"""Rule kind 2: elementwise. Operands are tied axis by axis under broadcasting."""

from __future__ import annotations

import functools

from torch import fx

from ...tracing.operators import Merge
from ...tracing.origin import Expr
from ..context import NodeContext, Result
from ..effects import ScalarSite
from ..state import AxisMap, State
from .registry import empty, line_of, rule


def tie_all(context: NodeContext, states: list[State], shape: tuple[int, ...]) -> State:
    """Tie operands that broadcast to `shape`; the result carries the coordinates of the richest one per axis."""
    n = len(shape)
    if len(states) == 1 and states[0].shape == shape:
        return State(shape, {a: m for a, m in states[0].axes.items() if shape[a] > 1})
    axes: dict[int, AxisMap] = {}
    for axis in range(n):
        length = shape[axis]
        if length == 1:
            continue
        maps = []
        for state in states:
            a = axis - (n - len(state.shape))
            if a >= 0 and state.shape[a] == length:
                maps.append(state.axes.get(a, {}))
        best = max(maps, key=len, default={})
        if best:
            for other in maps:
                if other is not best:
                    context.tie(best, other, length, _MET if other else functools.partial(_blocker, context))
            axes[axis] = best
    return State(shape, axes)


_MET = "combined with a tensor of which nothing can be removed along this axis"


def _blocker(context: NodeContext) -> str:
    for node in context.node.all_input_nodes:
        found = context.blocked_by(node, _MET)
        if found != _MET:
            return found.replace("reads the", "combined with the")
    return _MET


@rule("<pointwise>", "real", "imag")
def pointwise(context: NodeContext) -> Result:
    shape = context.shape
    states = [context.state(n) for n in context.node.all_input_nodes]
    if any(len(s.shape) > len(shape) for s in states):
        for s in states:
            context.freeze_state(s, "operator", f"{context.operation} changes the shape")
        return empty(context)
    _temperature(context)
    out = tie_all(context, states, shape)
    meta = context.node.meta["val"]
    return [State(s or (), out.axes) for s in context.shapes] if isinstance(meta, tuple) else out


def _temperature(context: NodeContext) -> None:
    """x * f(sizes) and x / f(sizes): the factor must not change when the sizes do."""
    scalars: dict[int, Expr] = context.node.meta.get("scalars") or {}
    operand = next((a for a in context.node.args if isinstance(a, fx.Node)), None)
    if operand is None or not scalars or not line_of(context).scales:
        return
    for position, expr in scalars.items():
        divide = line_of(context).merge is Merge.QUOTIENT and position == 1
        context.effects.scalars.append(ScalarSite(context.node, expr, operand, divide))


@rule("glu")
def glu(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    dim = int(context.arg(1, "dim", -1)) % n
    half = state.shape[dim] // 2
    axis_map = state.axis(dim)
    first = {d: v[:half] for d, v in axis_map.items() if (v[:half] >= 0).any()}
    second = {d: v[half:] for d, v in axis_map.items() if (v[half:] >= 0).any()}
    context.tie(first, second, half, "gated by a channel that cannot be removed")
    return state.with_axis(dim, half, first if len(first) >= len(second) else second)


@rule("prelu")
def prelu(context: NodeContext) -> Result:
    x, weight = context.state(context.arg(0)), context.state(context.arg(1))
    if weight.shape and weight.shape[0] > 1:
        context.tie(x.axis(1), weight.axis(0), weight.shape[0], "slope of a channel that cannot be removed")
    return State(context.shape, x.axes)


@rule("cumsum", "cumsum_", "cumprod", "logcumsumexp")
def running(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    dim = int(context.arg(1, "dim")) % max(len(state.shape), 1)
    context.statistics(state.axis(dim))
    return State(context.shape, state.axes)


@rule("tril", "triu", "tril_", "triu_")
def triangle(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    for axis in (n - 2, n - 1):
        context.freeze(state.axis(axis), "triangle", "a triangle of the matrix is kept")
    return State(context.shape, {a: m for a, m in state.axes.items() if a < n - 2})


@rule("quantize_per_channel", "fake_quantize_per_channel_affine", "fake_quantize_per_channel_affine_cachemask")
def per_channel(context: NodeContext) -> Result:
    x, scale, zero = (context.state(context.arg(i)) for i in range(3))
    axis = int(context.arg(3, "axis"))
    for other in (scale, zero):
        context.tie(x.axis(axis), other.axis(0), x.shape[axis], "scale of a channel that cannot be removed")
    out = State(x.shape, x.axes)
    return [out, out] if isinstance(context.node.meta["val"], tuple) else out


@rule("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "fake_quantize_per_tensor_affine_cachemask")
def per_tensor(context: NodeContext) -> Result:
    x = context.state(context.arg(0))
    out = State(x.shape, x.axes)
    return [out, out]


@rule("_fused_moving_avg_obs_fq_helper")
def observed(context: NodeContext) -> Result:
    """Quantisation-aware training: ranges, scales and zero points of the channels follow them."""
    x = context.state(context.arg(0))
    if context.arg(11, "per_row_fake_quant", False):
        axis = int(context.arg(10, "ch_axis"))
        for position in range(3, 7):
            other = context.state(context.arg(position))
            context.tie(x.axis(axis), other.axis(0), x.shape[axis], "scale of a channel that cannot be removed")
    out = State(x.shape, x.axes)
    return [out, out]
