"""Rule kind 3: contraction. Contracted axes are tied, batch axes are tied, the rest passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from ...tracing.operators import Layer, Matrices, Sliding, given
from ...tracing.origin import Literal, Operation, TensorSize
from ...tracing.recorder import Guard, TensorMeta
from ..context import NodeContext, Result
from ..effects import EqualCounts, ScalarSite
from ..groups import GroupKind
from ..state import AxisMap, State
from .elementwise import tie_all
from .registry import empty, line_of, rule


def contract(context: NodeContext, a: State, b: State, shape: tuple[int, ...]) -> State:
    """matmul(a, b) with a: (..., m, k), b: (..., k, n)."""
    context.tie(a.axis(-1), b.axis(-2), a.shape[-1], "contracted with features that cannot be removed")
    left = State((*a.shape[:-1], 1), {x: m for x, m in a.axes.items() if x != len(a.shape) - 1})
    right = State((*b.shape[:-2], 1, b.shape[-1]), {x: m for x, m in b.axes.items() if x != len(b.shape) - 2})
    _name_heads(context, left, right, a.axis(-1), b)
    return tie_all(context, [left, right], shape)


def _name_heads(context: NodeContext, a: State, b: State, inner: AxisMap, full: State) -> None:
    """Batch axes with coordinates are heads; what is contracted or produced per head are head features."""
    heads: AxisMap = {}
    for state in (a, b):
        for axis in range(len(state.shape) - 2):
            heads |= state.axis(axis)
    if heads:
        context.mark(heads, GroupKind.HEAD)
        context.mark(inner, GroupKind.QK_FEATURE)
        context.mark(b.axis(-1), GroupKind.V_FEATURE)


@rule("<matrices>")
def matmul(context: NodeContext) -> Result:
    form = line_of(context).form
    assert isinstance(form, Matrices)
    a, b = context.state(context.arg(form.left)), context.state(context.arg(form.left + 1))
    shape = context.shape
    if len(a.shape) == 1:
        a = State((1, *a.shape), {x + 1: m for x, m in a.axes.items()})
        shape = (*shape[:-1], 1, *shape[-1:]) if len(b.shape) > 1 else (1, 1)
    if len(b.shape) == 1:
        b = State((*b.shape, 1), b.axes)
        shape = (*shape, 1) if len(context.shape) == len(shape) else shape
    product = context.reshape(contract(context, a, b, shape), context.shape)
    if form.bias is None:
        return product
    return tie_all(context, [product, context.state(context.arg(form.bias))], context.shape)


@rule("<layer>")
def linear(context: NodeContext) -> Result:
    form = line_of(context).form
    assert isinstance(form, Layer)
    data = given(context.node, form.data)
    x, weight = context.state(data), context.state(given(context.node, form.weight))
    if len(weight.shape) != 2:
        for s in context.states():
            context.freeze_state(s, "operator", "a linear layer with one output")
        return empty(context)
    context.tie(x.axis(-1), weight.axis(form.reads), weight.shape[form.reads], _reads(context, data))
    last = len(x.shape) - 1
    made = weight.axis(form.produces)
    bias = given(context.node, form.bias)
    if bias is not None:
        context.tie_vectors(made, [bias], weight.shape[form.produces], "bias that cannot be removed")
    return State(context.shape, {a: m for a, m in x.axes.items() if a != last} | {last: made})


@rule("bilinear")
def bilinear(context: NodeContext) -> Result:
    x, y, weight = (context.state(context.arg(i)) for i in range(3))
    context.tie(x.axis(-1), weight.axis(1), weight.shape[1], "read by a layer whose inputs cannot be removed")
    context.tie(y.axis(-1), weight.axis(2), weight.shape[2], "read by a layer whose inputs cannot be removed")
    bias = context.arg(3, "bias")
    if bias is not None:
        context.tie(weight.axis(0), context.state(bias).axis(0), weight.shape[0], "bias that cannot be removed")
    last = len(x.shape) - 1
    lead = tie_all(
        context,
        [State((*s.shape[:-1], 1), {a: m for a, m in s.axes.items() if a != last}) for s in (x, y)],
        (*context.shape[:-1], 1),
    )
    return State(context.shape, {**lead.axes, last: weight.axis(0)})


@rule("<trilinear>")
def trilinear(context: NodeContext) -> Result:
    """What nn.functional.bilinear becomes: sums over products of three broadcast operands."""
    operands = [context.state(context.arg(i)) for i in range(3)]
    expands = [context.arg(i) for i in range(3, 6)]
    summed = [int(d) for d in context.arg(6)]
    n = len(operands[0].shape) + len(expands[0])
    full = []
    for state, expand in zip(operands, expands, strict=True):
        new = {int(e) % n for e in expand}
        old = iter(range(len(state.shape)))
        mapping = {next(old): a for a in range(n) if a not in new}
        shape = [1] * n
        for a, b in mapping.items():
            shape[b] = state.shape[a]
        full.append(state.moved(shape, mapping))
    joint_shape = tuple(max(s.shape[a] for s in full) for a in range(n))
    joint = tie_all(context, full, joint_shape)
    kept = [a for a in range(n) if a not in summed]
    return joint.moved(context.shape, {a: i for i, a in enumerate(kept)})


@rule("_grouped_mm")
def grouped_mm(context: NodeContext) -> Result:
    """Rows (S, K), sorted by expert, times the matrices of the experts (E, K, N); or plain batches of both."""
    rows, experts = context.state(context.arg(0)), context.state(context.arg(1))
    if len(experts.shape) != 3:  # gradients of the above
        for s in context.states():
            context.freeze_state(s, "operator", "no rule for _grouped_mm with groups along the contracted axis")
        return empty(context)
    if len(rows.shape) == 3:
        out = contract(context, rows, experts, context.shape)
    else:
        context.freeze(experts.axis(0), "index", "experts are picked by the router")
        context.tie(rows.axis(1), experts.axis(1), rows.shape[1], "contracted with features that cannot be removed")
        out = State(context.shape, {0: rows.axis(0), 1: experts.axis(2)})
    for operand, axis in ((0, len(rows.shape) - 1), (1, 2)):
        _aligned(context, context.arg(operand), axis)
    bias = context.arg(3, "bias")
    return out if bias is None else tie_all(context, [out, context.state(bias)], context.shape)


def _aligned(context: NodeContext, node: fx.Node, axis: int) -> None:
    """The kernel of _grouped_mm refuses rows whose bytes are no multiple of 16."""
    meta: TensorMeta = node.meta["val"]
    multiple = 16 // meta.dtype.itemsize
    if multiple > 1 and meta.shape[axis] % multiple == 0:
        rest = Operation("mod", (TensorSize(node, axis), Literal(multiple)))
        context.effects.guards.append(Guard("eq", rest, Literal(0), True, context.node.meta["source"]))


def _reads(context: NodeContext, data: Any) -> Callable[[], str]:
    return lambda: context.blocked_by(data, "reads channels that cannot be removed")


@rule("<sliding>")
def convolution(context: NodeContext) -> Result:
    form = line_of(context).form
    assert isinstance(form, Sliding)
    x, weight = context.state(context.arg(form.data)), context.state(context.arg(form.weight))
    transposed, groups = form.turned(context.arg), int(context.arg(form.groups) or 1)
    shape = context.shape
    for a, axis_map in weight.axes.items():
        if a >= 2:
            context.freeze(axis_map, "kernel", "kernel positions are no channels")
    axes: dict[int, AxisMap] = {}
    for a in sorted(x.axes):
        if a == 0 or (a >= 2 and _single_tap(context, form, weight.shape, a)):
            axes[a] = x.axes[a]
        elif a >= 2:
            context.freeze(x.axes[a], "spatial", "a convolution slides along this axis")
    if transposed:
        out = _transposed_channels(context, x, weight, groups)
    elif groups == 1:
        channels = x.axes.get(1, {})
        context.tie(channels, weight.axes.get(1, {}), weight.shape[1], _reads(context, context.arg(form.data)))
        out = weight.axes.get(0, {})
    else:
        out = _grouped_channels(context, x, weight, groups)
    bias = context.arg(form.bias)
    if bias is not None:
        context.tie_vectors(out, [bias], shape[1], "bias that cannot be removed")
    return State(shape, axes | {1: out})


def _single_tap(context: NodeContext, form: Sliding, kernel: tuple[int, ...], axis: int) -> bool:
    """Whether a convolution leaves its positions along `axis` apart and in place: one tap that moves by one."""
    if kernel[axis] != 1:
        return False
    stride, padding = (_of_axis(context.arg(position), axis) for position in (form.stride, form.padding))
    extra = form.output_padding is not None and _of_axis(context.arg(form.output_padding), axis)
    return stride == 1 and padding == 0 and not extra


def _of_axis(values: Any, axis: int) -> Any:
    """What a number for all axes after the channels, or a list with one for each, says about `axis`."""
    if not isinstance(values, (list, tuple)):
        return values
    return values[axis - 2] if len(values) > 1 else values[0]


def _grouped_channels(context: NodeContext, x: State, weight: State, groups: int) -> AxisMap:
    """weight (O, I/g, ...): both channel axes are (groups, channels per group)."""
    inner, outer = weight.shape[1], weight.shape[0] // groups
    xs = context.reshape(State((x.shape[1],), {0: x.axis(1)}), (groups, inner))
    ws = context.reshape(State((weight.shape[0],), {0: weight.axis(0)}), (groups, outer))
    context.tie(xs.axis(0), ws.axis(0), groups, "group of a convolution that cannot be removed")
    context.tie(xs.axis(1), weight.axis(1), inner, _reads(context, context.arg(0)))
    _group_sites(context, xs, ws, groups, inner, outer)
    return weight.axis(0)


def _transposed_channels(context: NodeContext, x: State, weight: State, groups: int) -> AxisMap:
    """weight (I, O/g, ...): the output axis is (groups, O/g), assembled from two axes."""
    if groups == 1:
        context.tie(x.axis(1), weight.axis(0), weight.shape[0], _reads(context, context.arg(0)))
        return weight.axis(1)
    inner, outer = weight.shape[0] // groups, weight.shape[1]
    context.tie(x.axis(1), weight.axis(0), weight.shape[0], _reads(context, context.arg(0)))
    ws = context.reshape(State((weight.shape[0],), {0: weight.axis(0)}), (groups, inner))
    parts = State((groups, outer), {0: ws.axis(0), 1: weight.axis(1)})
    _group_sites(context, ws, parts, groups, inner, outer)
    return context.reshape(parts, (groups * outer,)).axis(0)


def _group_sites(context: NodeContext, xs: State, ws: State, groups: int, inner: int, outer: int) -> None:
    sizes = context.sizes
    expr = sizes.values[0] if sizes is not None and sizes.kind == "groups" else Literal(groups)
    axis_map = xs.axis(0) or ws.axis(0)
    context.require(expr, axis_map, groups, "groups of a convolution")
    if inner > 1 or outer > 1:
        context.mark(axis_map, GroupKind.CONV_GROUP if inner > 1 else GroupKind.CHANNEL)
        context.mark(xs.axis(1), GroupKind.GROUP_CHANNEL)
        context.mark(ws.axis(1), GroupKind.GROUP_CHANNEL)


@rule("<attention>")
def attention(context: NodeContext) -> Result:
    q, k, v = (context.state(context.arg(i)) for i in range(3))
    n = len(q.shape)
    shape = (*q.shape[:-1], v.shape[-1])
    context.tie(q.axis(-1), k.axis(-1), q.shape[-1], "contracted with features that cannot be removed")
    context.tie(k.axis(-2), v.axis(-2), k.shape[-2], "attends to tokens that cannot be removed")
    context.statistics(k.axis(-2))
    axes: dict[int, AxisMap] = {}
    for axis in range(n - 2):
        axis_map = q.axis(axis)
        for other in (k, v):
            m, length = other.axis(axis), q.shape[axis]
            if other.shape[axis] == 1:  # one head of keys and values serves all heads of the queries
                continue
            if other.shape[axis] != length:  # enable_gqa: each KV head serves a run of query heads
                m = {d: np.repeat(c, length // other.shape[axis]) for d, c in m.items()}
            context.tie(axis_map, m, length, "attention with heads that cannot be removed")
        axes[axis] = axis_map
        context.mark(axis_map, GroupKind.HEAD)
        if axis_map:
            for other, kind in ((q, GroupKind.QK_FEATURE), (k, GroupKind.QK_FEATURE), (v, GroupKind.V_FEATURE)):
                context.mark(other.axis(-1), kind)
    axes[n - 2], axes[n - 1] = q.axis(-2), v.axis(-1)
    mask = (
        context.arg(3, "attn_mask")
        if context.operation == "scaled_dot_product_attention"
        else context.arg(99, "attn_mask")
    )
    if mask is not None:
        bias = context.state(mask)
        scores = State((*q.shape[:-1], k.shape[-2]), {**{a: axes[a] for a in range(n - 1)}, n - 1: k.axis(-2)})
        tie_all(context, [scores, bias], scores.shape)
    _equal_features(context, q.axis(-1), v.axis(-1))
    scale = (context.node.meta.get("scalars") or {}).get(-1)
    if context.arg(99, "scale") is None or scale is not None:
        last = TensorSize(context.node.all_input_nodes[0], n - 1)
        expr = scale or Operation("pow", (last, Literal(-0.5)))
        context.effects.scalars.append(ScalarSite(context.node, expr, context.node.all_input_nodes[0], False))
    out = State(shape, axes)
    meta = context.node.meta["val"]
    if isinstance(meta, tuple):
        return [out, *([None] * (len(meta) - 1))]
    return out


def _equal_features(context: NodeContext, a: AxisMap, b: AxisMap) -> None:
    """Fused kernels want q, k and v equally wide: keep the counts equal."""
    da, db = list(a), list(b)
    if len(da) == len(db) and [context.dims.size[d] for d in da] == [context.dims.size[d] for d in db]:
        for x, y in zip(da, db, strict=True):
            if x != y:
                sets = (context.dims.positions(x), context.dims.positions(y))
                text = "query and value features per head"
                context.effects.equal.append(EqualCounts(sets, text, context.node, soft=True))


@rule("<rows>")
def embedding(context: NodeContext) -> Result:
    weight, index = context.state(context.arg(0)), context.state(context.arg(1))
    context.freeze_state(index, "index", "used as an index")
    context.freeze(weight.axis(0), "vocabulary", "rows are looked up by index")
    meta = context.node.meta["val"]
    shape = context.shape
    out = State(shape, {len(shape) - 1: weight.axis(1)})
    return [out, *([None] * (len(meta) - 1))] if isinstance(meta, tuple) else out
