"""Rule kind 1: data movement. Coordinates move exactly as the data does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...tracing.origin import Attribute, Expr, Literal, Operation, TensorSize, leaves
from ..context import NodeContext, Result
from ..state import AxisMap, State, axis_of, concatenate
from .registry import empty, rule


@rule("<stays>", "as_strided_", "_conj", "_neg_view", "fill_", "zero_", "fill")
def same_place(context: NodeContext) -> Result:
    state = context.state(context.arg(0, "self"))
    return State(context.shape, state.axes) if state.shape == context.shape else empty(context)


@rule(
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_empty_strided",
    "bernoulli", "bernoulli_", "uniform_", "normal_", "random_",
)  # fmt: skip
def shaped_like(context: NodeContext) -> Result:
    return same_place(context)


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def created(context: NodeContext) -> Result:
    """A fresh tensor whose every element is alike follows the tensor its sizes were taken from; where they are computed
    from attributes it follows what it meets."""
    alike = context.operation not in ("rand", "randn")
    axes: dict[int, AxisMap] = {}
    sizes = context.sizes
    if sizes is not None and sizes.kind == "creation" and len(sizes.values) == len(context.shape):
        for axis, expr in enumerate(sizes.values):
            if isinstance(expr, TensorSize):
                axes[axis] = context.state(expr.node).axis(expr.axis)
            elif expr is not None and (alike or not isinstance(expr, Literal)):
                axes[axis] = context.fresh(axis) if alike else {}
                context.require(expr, axes[axis], context.shape[axis], "the size of a new tensor")
    return State(context.shape, axes)


@rule(
    "scalar_tensor", "arange", "eye", "linspace", "randint", "randperm", "tril_indices", "triu_indices", "nonzero",
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "numel", "size", "stride", "dim",
    "hann_window", "hamming_window",
)  # fmt: skip
def no_coordinates(context: NodeContext) -> Result:
    for state in context.states():
        context.freeze_state(state, "values", f"{context.operation} turns it into plain numbers")
    return empty(context)


@rule("<reshapes>")
def view(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    shape = context.shape
    if math.prod(state.shape) != math.prod(shape):  # view(dtype) with another item size
        context.freeze_state(state, "operator", "reinterpreted as another dtype")
        return empty(context)
    out = context.reshape(state, shape)
    sizes = context.sizes
    if sizes is not None and sizes.kind == "shape":
        _require_shape(context, out, sizes.values)
    return out


def _require_shape(context: NodeContext, out: State, values: tuple[Any, ...]) -> None:
    """Compare the sizes written by the user with the axes of the result, from the last one backwards."""
    ndim = len(out.shape)
    for back, expr in enumerate(reversed(values)):
        axis = ndim - 1 - back
        if expr is None or axis < 0 or _is_minus_one(expr):
            continue
        context.require(expr, out.axis(axis), out.shape[axis], f"size {axis} in {context.node.meta.get('function')}()")


def _is_minus_one(expr: Expr) -> bool:
    if isinstance(expr, Literal):
        return expr.value == -1
    return isinstance(expr, Operation) and expr.function == "neg" and expr.args == (Literal(1),)


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    shape = context.shape
    added = len(shape) - len(state.shape)
    axes = {
        a + added: {d: np.repeat(v, shape[a + added]) for d, v in m.items()} if state.shape[a] == 1 else m
        for a, m in state.axes.items()
    }
    sizes = context.sizes
    if sizes is not None and sizes.kind == "shape":
        for back, expr in enumerate(reversed(sizes.values)):
            axis = len(shape) - 1 - back
            if axis < 0 or expr is None or _is_minus_one(expr):
                continue
            if shape[axis] > 1 and (axis < added or state.shape[axis - added] == 1) and axis not in axes:
                axes[axis] = _stretched(context, expr, axis)
            else:
                context.require(expr, axes.get(axis, {}), shape[axis], f"size {axis} in {sizes.function}()")
    return State(shape, axes)


def _stretched(context: NodeContext, expr: Expr, axis: int) -> AxisMap:
    """What lies along an axis of length 1 that was made as long as `expr` says."""
    if isinstance(expr, TensorSize):
        return context.state(expr.node).axis(expr.axis)
    axis_map = context.fresh(axis) if _follows(context, expr, axis) else {}
    context.require(expr, axis_map, context.shape[axis], f"size {axis} in {context.node.meta.get('function')}()")
    return axis_map


def _follows(context: NodeContext, expr: Expr, axis: int) -> bool:
    """A repeated tensor may become as long as what it meets: an index or a mask; a head of keys and values where no
    other axis is repeated along with it, as query heads that share a head of keys keep their number."""
    dtype = context.node.meta["val"].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    found = list(leaves(expr))
    return bool(found) and all(isinstance(x, Attribute) for x in found) and axis > 0 and context.shape[axis - 1] == 1


@rule("permute", "permute_copy")
def permute(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    order = [axis_of(d, len(state.shape)) for d in context.arg(1, "dims")]
    return state.moved(context.shape, {old: new for new, old in enumerate(order)})


@rule("transpose", "transpose_", "t", "t_", "swapaxes", "swapdims", "transpose_copy", "numpy_T", "mT", "T", "adjoint")
def transpose(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    if n < 2:
        return State(context.shape, state.axes)
    a, b = axis_of(context.arg(1, "dim0", -2), n), axis_of(context.arg(2, "dim1", -1), n)
    return state.moved(context.shape, {i: (b if i == a else a if i == b else i) for i in range(n)})


@rule("movedim", "moveaxis")
def movedim(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    source, target = context.arg(1, "source"), context.arg(2, "destination")
    source = [source] if isinstance(source, int) else list(source)
    target = [target] if isinstance(target, int) else list(target)
    source, target = [axis_of(s, n) for s in source], [axis_of(t, n) for t in target]
    rest = iter([i for i in range(n) if i not in source])
    where = dict(zip(target, source, strict=True))
    return state.moved(context.shape, {where[j] if j in where else next(rest): j for j in range(n)})


@rule("unsqueeze", "unsqueeze_", "unsqueeze_copy")
def unsqueeze(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    new = axis_of(context.arg(1, "dim"), len(state.shape) + 1)
    return state.moved(context.shape, {a: a + (a >= new) for a in range(len(state.shape))})


@rule("squeeze", "squeeze_", "squeeze_copy", "atleast_1d", "atleast_2d", "atleast_3d")
def squeeze(context: NodeContext) -> Result:
    return context.reshape(context.state(context.arg(0)), context.shape)


@rule("cat", "concat", "concatenate")
def cat(context: NodeContext) -> Result:
    shape = context.shape
    dim = axis_of(context.arg(1, "dim", 0), len(shape))
    states = [context.state(t) for t in context.arg(0, "tensors")]
    states = [s for s in states if len(s.shape) == len(shape)]  # torch skips empty 1-D tensors
    out = {dim: concatenate([(s.axis(dim), s.shape[dim]) for s in states])}
    for axis in range(len(shape)):
        if axis != dim:
            out[axis] = _tied(context, states, axis, axis)
    return State(shape, out)


@rule("stack")
def stack(context: NodeContext) -> Result:
    shape = context.shape
    dim = axis_of(context.arg(1, "dim", 0), len(shape))
    states = [context.state(t) for t in context.arg(0, "tensors")]
    out = {a + (a >= dim): _tied(context, states, a, a + (a >= dim)) for a in range(len(shape) - 1)}
    return State(shape, out)


def _tied(context: NodeContext, states: list[State], axis: int, out_axis: int) -> AxisMap:
    """All tensors lose the same indices of this axis."""
    maps = [s.axis(axis) for s in states]
    best = max(maps, key=len)
    for other in maps:
        if other is not best:
            context.tie(best, other, context.shape[out_axis], "laid beside a tensor whose channels cannot be removed")
    return best


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d", "_pad_circular")  # fmt: skip
def pad(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    amounts = list(context.arg(1, "pad") or context.arg(1, "padding"))
    axes = dict(state.axes)
    n = len(state.shape)
    for position in range(len(amounts) // 2):
        axis = n - 1 - position
        before, after = amounts[2 * position], amounts[2 * position + 1]
        if (before or after) and axis in axes:
            if context.operation not in ("constant_pad_nd", "pad") or before < 0 or after < 0:
                context.freeze(axes.pop(axis), "padding", "padded by copies of its own edge or cropped")
            else:
                axes[axis] = {d: np.pad(v, (before, after), constant_values=-1) for d, v in axes[axis].items()}
    return State(context.shape, axes)


@rule("repeat", "tile")
def repeat(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    shape = context.shape
    added = len(shape) - len(state.shape)
    axes = {}
    for a, axis_map in state.axes.items():
        times = shape[a + added] // state.shape[a]
        axes[a + added] = {d: np.tile(v, times) for d, v in axis_map.items()}
    sizes = context.sizes
    if sizes is not None and sizes.kind == "repeats":
        for back, expr in enumerate(reversed(sizes.values)):
            axis = len(shape) - 1 - back
            if isinstance(expr, Literal) or axis < 0:
                continue
            if shape[axis] > 1 and (axis < added or state.shape[axis - added] == 1) and axis not in axes:
                axes[axis] = _stretched(context, expr, axis)
            else:
                times = shape[axis] // (state.shape[axis - added] if axis >= added else 1)
                context.require(expr, {}, times, "a number of repeats")
    return State(shape, axes)


@rule("repeat_interleave")
def repeat_interleave(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    dim = context.arg(2, "dim")
    if isinstance(context.arg(1, "repeats"), int) and dim is not None:
        dim = axis_of(dim, len(state.shape))
        times = int(context.arg(1, "repeats"))
        return state.with_axis(dim, context.shape[dim], {d: np.repeat(v, times) for d, v in state.axis(dim).items()})
    for s in context.states():
        context.freeze_state(s, "operator", "repeated a different number of times per index")
    return empty(context)


@rule("flip", "fliplr", "flipud")
def flip(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    dims = context.arg(1, "dims", {"fliplr": [1], "flipud": [0]}.get(context.operation))
    axes = dict(state.axes)
    for dim in [dims] if isinstance(dims, int) else dims:
        axis = axis_of(dim, len(state.shape))
        if axis in axes:
            axes[axis] = {d: v[::-1] for d, v in axes[axis].items()}
    return State(context.shape, axes)


def _through(context: NodeContext, state: State, split_shape: list[int], order: list[int]) -> State:
    """View as `split_shape`, permute, and merge to the result's shape."""
    parts = context.reshape(state, split_shape)
    permuted = parts.moved([split_shape[i] for i in order], {old: new for new, old in enumerate(order)})
    return context.reshape(permuted, context.shape)


@rule("pixel_shuffle")
def pixel_shuffle(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    r = int(context.arg(1, "upscale_factor"))
    *lead, c, h, w = state.shape
    n = len(lead)
    split_shape = [*lead, c // (r * r), r, r, h, w]
    parts = context.reshape(state, split_shape)
    for axis in (n + 1, n + 2):
        context.freeze(parts.axis(axis), "literal", f"pixel_shuffle by {r}")
    return _through(context, state, split_shape, [*range(n), n, n + 3, n + 1, n + 4, n + 2])


@rule("pixel_unshuffle")
def pixel_unshuffle(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    r = int(context.arg(1, "downscale_factor"))
    *lead, c, h, w = state.shape
    n = len(lead)
    return _through(context, state, [*lead, c, h // r, r, w // r, r], [*range(n), n, n + 2, n + 4, n + 1, n + 3])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    groups = int(context.arg(1, "groups"))
    b, c, *rest = state.shape
    split_shape = [b, groups, c // groups, *rest]
    parts = context.reshape(state, split_shape)
    sizes = context.sizes
    expr = sizes.values[0] if sizes is not None and sizes.kind == "groups" else Literal(groups)
    context.require(expr, parts.axis(1), groups, "groups of a channel shuffle")
    return _through(context, state, split_shape, [0, 2, 1, *range(3, len(split_shape))])


@rule("im2col")
def im2col(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    taps = math.prod(context.arg(1, "kernel_size"))
    n = len(state.shape)
    axes = {0: state.axis(0)} if n == 4 else {}
    axes[n - 3] = {d: np.repeat(v, taps) for d, v in state.axis(n - 3).items()}
    _only_axes(context, state, (0, n - 3))
    return State(context.shape, axes)


@rule("col2im")
def col2im(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    taps = math.prod(context.arg(2, "kernel_size"))
    n = len(state.shape)
    shape = state.shape
    split = context.reshape(state, [*shape[:-2], shape[-2] // taps, taps, shape[-1]])
    context.freeze(split.axis(n - 1), "kernel", "kernel positions of fold()")
    context.freeze(split.axis(n), "spatial", "spatial positions of fold()")
    return State(context.shape, {a: split.axis(a) for a in range(n - 1)})


@rule("unfold", "unfold_copy")
def unfold(context: NodeContext) -> Result:
    """Tensor.unfold(dim, size, step): windows along one axis, in a new last axis."""
    state = context.state(context.arg(0))
    dim = axis_of(context.arg(1, "dimension"), len(state.shape))
    context.freeze(state.axis(dim), "window", "sliding windows are taken along this axis")
    return State(context.shape, {a: m for a, m in state.axes.items() if a != dim})


def _only_axes(context: NodeContext, state: State, allowed: tuple[int, ...]) -> None:
    for axis, axis_map in state.axes.items():
        if axis not in allowed:
            context.freeze(axis_map, "spatial", f"{context.operation} works along this axis")


@rule("diagonal", "diagonal_copy", "as_strided", "as_strided_copy", "rot90", "unique", "_unique2")
def frozen(context: NodeContext) -> Result:
    for state in context.states():
        context.freeze_state(state, "operator", f"{context.operation} rearranges its positions")
    return empty(context)
