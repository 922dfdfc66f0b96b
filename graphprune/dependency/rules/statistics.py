"""Rule kind 4: normalisation, reduction, pooling and softmax. Parameters are tied, reduced axes dropped."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...tracing.origin import Literal
from ..context import NodeContext, Result
from ..state import State
from .registry import empty, line_of, rule

_NORM = "norm of a channel that cannot be removed"


def _several(context: NodeContext, out: State) -> Result:
    """The first result carries the coordinates; statistics returned beside it do not."""
    meta = context.node.meta["val"]
    return [out, *([None] * (len(meta) - 1))] if isinstance(meta, tuple) else out


def _of_the_batch(context: NodeContext) -> bool:
    """Whether a batch norm takes the statistics of its input, not stored ones."""
    said = line_of(context).own_statistics
    if isinstance(said, bool):
        return said
    position = 3 if "no_stats" in context.node.target._overloadname else said  # type: ignore[union-attr]
    return context.arg(position, "training") is True


@rule("<batch norm>")
def batch_norm(context: NodeContext) -> Result:
    x = context.state(context.arg(0))
    parameters = [a for a in context.node.args[1:5] if isinstance(a, fx.Node)]
    if _of_the_batch(context):  # standardised weights: the mean over a filter changes with the channels it reads
        for axis in (0, *range(2, len(x.shape))):
            context.statistics(x.axis(axis))
    context.tie_vectors(x.axes.get(1, {}), parameters, x.shape[1], _NORM)
    return _several(context, State(x.shape, x.axes))


@rule("<layer norm>", "<rms norm>")
def layer_norm(context: NodeContext) -> Result:
    x = context.state(context.arg(0))
    normalized = context.arg(1, "normalized_shape")
    k, n = len(normalized), len(x.shape)
    sizes = context.sizes
    exprs = sizes.values if sizes is not None and sizes.kind == "normalized_shape" else [Literal(s) for s in normalized]
    for j in range(k):
        axis = n - k + j
        axis_map = x.axis(axis)
        context.statistics(axis_map)
        context.require(exprs[j], axis_map, x.shape[axis], "normalized_shape")
        for argument in (context.arg(2, "weight"), context.arg(3, "bias")):
            if hasattr(argument, "meta"):
                parameter = context.state(argument)
                context.tie(axis_map, parameter.axis(j), x.shape[axis], "norm of a feature that cannot be removed")
    return _several(context, State(x.shape, x.axes))


@rule("<group norm>")
def group_norm(context: NodeContext) -> Result:
    x = context.state(context.arg(0))
    native = context.operation == "native_group_norm"
    groups = int(context.arg(6 if native else 1, "group" if native else "num_groups"))
    weight, bias = (context.arg(1), context.arg(2)) if native else (context.arg(2), context.arg(3))
    if x.axis(1):
        if groups < x.shape[1]:
            context.statistics(x.axis(1))
            context.require_equal(x.axis(1), x.shape[1], groups, "groups of a GroupNorm", apart=False)
        else:  # one channel per group: the number of groups is the number of channels
            sizes = context.sizes
            expr = sizes.values[0] if sizes is not None and sizes.kind == "groups" else Literal(groups)
            context.require(expr, x.axis(1), x.shape[1], "groups of a GroupNorm")
    context.tie_vectors(x.axis(1), [p for p in (weight, bias) if p is not None], x.shape[1], _NORM)
    return _several(context, State(x.shape, x.axes))


def _reduced_axes(dims: Any, n: int) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(n))
    return {int(d) % n for d in ([dims] if isinstance(dims, int) else dims)} if n else set()


def reduce(context: NodeContext, dims: Any) -> Result:
    state = context.state(context.arg(0))
    n = len(state.shape)
    axes = _reduced_axes(dims, n)
    for axis in axes:
        context.statistics(state.axis(axis))
    keep = len(context.shape) == n
    kept = [a for a in range(n) if a not in axes]
    mapping = {a: (a if keep else i) for i, a in enumerate(kept)}
    meta = context.node.meta["val"]
    if isinstance(meta, tuple):
        return [state.moved(s, mapping) if s is not None else None for s in context.shapes]
    return state.moved(context.shape, mapping)


@rule("<reduction>", "aminmax")
def reduction(context: NodeContext) -> Result:
    if context.operation == "aminmax":
        return reduce(context, context.arg(99, "dim"))
    dims = context.arg(1, "dim")
    return reduce(context, None if isinstance(dims, bool) else dims)


@rule("norm", "linalg_vector_norm")
def norm(context: NodeContext) -> Result:
    dims = context.arg(2, "dim")
    return reduce(context, dims)


@rule("max", "min", "median", "nanmedian", "mode", "argmax", "argmin", "kthvalue")
def selecting_reduction(context: NodeContext) -> Result:
    """Values along an axis; the index returned beside them would be renumbered, so it must not be used."""
    if len(context.node.all_input_nodes) == 2:  # max(a, b)
        from .elementwise import pointwise

        return pointwise(context)
    dims = context.arg(2 if context.operation == "kthvalue" else 1, "dim")
    state = context.state(context.arg(0))
    indices_used = context.operation in ("argmax", "argmin") or any(user.args[1] == 1 for user in context.node.users)
    if indices_used:
        for axis in _reduced_axes(dims, len(state.shape)):
            context.freeze(state.axis(axis), "index", f"{context.operation} returns positions along this axis")
    return reduce(context, dims)


@rule("<softmax>")
def softmax(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    context.statistics(state.axis(int(context.arg(1, "dim"))))
    return State(context.shape, state.axes)


@rule("topk", "sort", "argsort", "msort")
def ordering(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    default = -1
    position = 2 if context.operation == "topk" else 1
    dim = context.arg(position, "dim", default)
    axis = (
        int(dim) % max(len(state.shape), 1)
        if isinstance(dim, int) and not isinstance(dim, bool)
        else len(state.shape) - 1
    )
    context.freeze(state.axis(axis), "index", f"{context.operation} orders positions along this axis")
    axes = {a: m for a, m in state.axes.items() if a != axis}
    meta = context.node.meta["val"]
    if isinstance(meta, tuple):
        return [State(s or (), axes) for s in context.shapes]
    return State(context.shape, axes)


def _single_window(context: NodeContext, trailing: int, i: int) -> bool:
    """Whether a pool leaves its i-th axis as it is: a window of one position that moves by one."""
    if not context.operation.removesuffix("_with_indices").startswith(("avg_pool", "max_pool")):
        return False
    if isinstance(context.node.meta["val"], tuple) and any(user.args[1] != 0 for user in context.node.users):
        return False  # the positions of the maxima count along all axes
    kernel = _per_axis(context.arg(1, "kernel_size"), trailing, 1)
    stride = _per_axis(context.arg(2, "stride"), trailing, kernel[i])
    padding = _per_axis(context.arg(3, "padding"), trailing, 0)
    return kernel[i] == 1 and stride[i] == 1 and padding[i] == 0


def _per_axis(value: Any, count: int, default: int) -> list[int]:
    """An argument that may be one number, a list of one or of `count`, or left out."""
    items = [value] if isinstance(value, int) else list(value or ())
    return (items or [default]) * (count if len(items) < 2 else 1)


@rule("<pooling>", "<resampling>")
def spatial(context: NodeContext) -> Result:
    """Works on the trailing axes; batch and channels pass, and axes whose window is a single position."""
    state = context.state(context.arg(0))
    n = len(state.shape)
    trailing = int(next((c for c in context.operation if c.isdigit()), "2"))
    moved = [n - trailing + i for i in range(trailing) if not _single_window(context, trailing, i)]
    for axis in moved:
        context.freeze(state.axis(axis), "spatial", f"{context.operation} works along this axis")
    axes = {a: m for a, m in state.axes.items() if a not in moved}
    for other in context.node.all_input_nodes[1:]:
        context.freeze_state(context.state(other), "spatial", f"{context.operation} uses it as positions")
    meta = context.node.meta["val"]
    if isinstance(meta, tuple):
        return [State(s or (), axes) for s in context.shapes]
    return State(context.shape, axes)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(context: NodeContext) -> Result:
    x, grid = context.state(context.arg(0)), context.state(context.arg(1))
    context.freeze_state(grid, "spatial", "used as positions")
    for axis in range(2, len(x.shape)):
        context.freeze(x.axis(axis), "spatial", "sampled along this axis")
    return State(context.shape, {a: m for a, m in x.axes.items() if a < 2})


@rule("<weight norm>")
def weight_norm(context: NodeContext) -> Result:
    """w = v * g / |v|: the norm over the other axes is a statistic of theirs."""
    v, g = context.state(context.arg(0)), context.state(context.arg(1))
    dim = int(context.arg(2, "dim", 0)) % max(len(v.shape), 1)
    context.tie(v.axis(dim), g.axis(dim) if len(g.shape) == len(v.shape) else g.axis(0), v.shape[dim])
    for axis, axis_map in v.axes.items():
        if axis != dim:
            context.statistics(axis_map)
    return _several(context, State(v.shape, v.axes))


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fft(context: NodeContext) -> Result:
    state = context.state(context.arg(0))
    axes = {int(d) % len(state.shape) for d in context.arg(1, "dim")}
    for axis in axes:
        context.freeze(state.axis(axis), "spatial", "a Fourier transform runs along this axis")
    return State(context.shape, {a: m for a, m in state.axes.items() if a not in axes})


@rule("_cdist_forward", "cdist")
def cdist(context: NodeContext) -> Result:
    for state in context.states():
        context.freeze_state(state, "operator", f"no rule for the operator {context.operation}")
    return empty(context)
