"""A reference in which removed channels are absent instead of zero: NaN means "not there".

Removed slices of the untouched network are set to NaN and its ordinary forward pass is run. NaN travels through data
movement and elementwise functions by itself. Where values of several positions are combined, the absent ones are left
out: sums, means, norms, softmax and products of matrices run over what is there. What comes out must be free of NaN
and equal to the pruned network, also where a statistic over the channels changes when some of them go (LayerNorm,
GroupNorm, softmax over channels), which zeroing cannot show. An operation that is not known here lets NaN spread, so
that a channel which mixes with others in some other way shows up as NaN in the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NAN = float("nan")
INFINITY = float("inf")
# They choose between values instead of combining them.
_CHOOSE = {aten.copy_, aten.fill_, aten.zero_, aten.where, aten.masked_fill, aten.masked_fill_}


@contextlib.contextmanager
def absent_positions() -> Iterator[None]:
    """Inside, NaN in a tensor means that the position is absent. No gradients; plain kernels only."""
    fast_path, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _AbsentMode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(fused)


class _AbsentMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, *args, **kwargs)
        if torch.Tag.pointwise not in func.tags or func.overloadpacket in _CHOOSE:
            return func(*args, **kwargs)
        # Some kernels forget NaN (sign, hardtanh, x**0): put it back.
        gone = [a.isnan() for a in args if isinstance(a, Tensor) and _inexact(a)]
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and _inexact(out):
            for mask in gone:
                if bool(mask.any()):
                    out.masked_fill_(mask.expand(torch.broadcast_shapes(mask.shape, out.shape)), NAN)
        return out


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _without(tensor: Tensor, value: float = 0.0) -> Tensor:
    """Absent positions replaced by a value that does not count."""
    return torch.where(tensor.isnan(), value, tensor) if _inexact(tensor) else tensor


def _mark(out: Tensor, gone: Tensor) -> Tensor:
    return torch.where(gone, torch.full((), NAN, dtype=out.dtype), out)


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.matmul(_without(a), _without(b))
    return _mark(out, a.isnan().all(-1).unsqueeze(-1) | b.isnan().all(-2).unsqueeze(-2))


def _mm(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return _matrix_product(a, b)


def _addmm(func: Any, shift: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return shift * beta + _matrix_product(a, b) * alpha


def _linear(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _matrix_product(x, weight.t())
    return out if bias is None else out + bias


def _mv(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return _mark(_without(a) @ _without(b), a.isnan().all(-1))


def _dot(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(_without(a), _without(b))


def _trilinear(
    func: Any, a: Tensor, b: Tensor, c: Tensor, ea: Any, eb: Any, ec: Any, total: Any, unroll: int = 1
) -> Tensor:  # fmt: skip
    for axes, which in ((ea, 0), (eb, 1), (ec, 2)):
        for axis in axes:
            a, b, c = (t.unsqueeze(axis) if i == which else t for i, t in enumerate((a, b, c)))
    gone = (a.isnan() | b.isnan() | c.isnan()).all(dim=tuple(total))
    return _mark((_without(a) * _without(b) * _without(c)).sum(dim=tuple(total)), gone)


def _cdist(func: Any, a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return torch.cdist(_without(a), _without(b), p)


def _convolution(
    func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    out = torch.convolution(
        _without(x), _without(weight), None, stride, padding, dilation, transposed, output_padding, groups
    )
    if transposed:
        gone = weight.isnan().view(groups, weight.shape[0] // groups, weight.shape[1], -1).all(-1).all(1).flatten()
    else:
        gone = weight.isnan().flatten(1).all(1)
    shape = (-1, *[1] * (weight.dim() - 2))
    out = _mark(out, gone.view(shape))
    return out if bias is None else out + bias.view(shape)


def _deformable(func: Any, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    out = func(_without(x), _without(weight), offset, mask, torch.zeros_like(bias), *rest)
    return _mark(out, weight.isnan().flatten(1).all(1).view(-1, 1, 1)) + bias.view(-1, 1, 1)


def _moments(x: Tensor, axes: tuple[int, ...], correction: float = 0.0) -> tuple[Tensor, Tensor]:
    count = (~x.isnan()).sum(axes, keepdim=True)
    mean = _sum_of(x, axes, True) / count
    return mean, _sum_of((x - mean) ** 2, axes, True) / (count - correction)


def _sum_of(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _mark(_without(x).sum(axes, keepdim=keep), x.isnan().all(axes, keepdim=keep))


def _layer_norm(func: Any, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    mean, variance = _moments(x, tuple(range(-len(shape), 0)))
    scale = torch.rsqrt(variance + eps)
    out = (x - mean) * scale
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, scale


def _rms_norm(func: Any, x: Tensor, shape: Any, weight: Tensor | None, eps: float | None) -> Any:
    axes = tuple(range(-len(shape), 0))
    mean = _moments(x**2, axes)[0]
    scale = torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
    return (x * scale if weight is None else x * scale * weight), scale


def _group_norm(
    func: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int, eps: float
) -> Any:
    grouped = x.reshape(n, groups, -1)
    mean, variance = _moments(grouped, (-1,))
    scale = torch.rsqrt(variance + eps)
    out = ((grouped - mean) * scale).view_as(x)
    shape = (-1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)), mean, scale


def _softmax(func: Any, x: Tensor, dim: int, *rest: Any) -> Tensor:
    function = torch.log_softmax if func.overloadpacket is aten._log_softmax else torch.softmax
    out = function(_without(x, -INFINITY), dim)
    return _mark(out.nan_to_num() if func.overloadpacket is aten._safe_softmax else out, x.isnan())


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(x.dim()))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _sum(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if not _inexact(x):
        return torch.sum(x, _axes(x, dim), keepdim, dtype=dtype)
    return _sum_of(x, _axes(x, dim), keepdim)


def _mean(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    axes = _axes(x, dim)
    return _sum_of(x, axes, keepdim) / (~x.isnan()).sum(axes, keepdim=keepdim)


def _variance(func: Any, x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    axes = _axes(x, dim)
    mean, out = _moments(x, axes, 1.0 if correction is None else correction)
    packet = func.overloadpacket
    out = out.sqrt() if packet in (aten.std, aten.std_mean) else out
    gone = x.isnan().all(axes, keepdim=True)
    results = [_mark(t, gone) if keepdim else _mark(t, gone).squeeze(axes) for t in (out, mean)]
    return tuple(results) if packet in (aten.var_mean, aten.std_mean) else results[0]


def _extreme(func: Any, x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    packet = func.overloadpacket
    if isinstance(dim, Tensor) or not _inexact(x):  # elementwise maximum of two tensors
        return func(x, dim) if isinstance(dim, Tensor) else func(x, dim, keepdim)
    sign = INFINITY if packet in (aten.min, aten.amin) else -INFINITY
    gone = x.isnan().all(_axes(x, dim), keepdim=keepdim)
    if packet in (aten.amax, aten.amin) or isinstance(dim, int):
        out = func(_without(x, sign), dim, keepdim)
    else:
        out = func(_without(x, sign))
    return _mark(out, gone) if isinstance(out, Tensor) else (_mark(out[0], gone), out[1])


def _vector_norm(func: Any, x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Tensor:
    axes = _axes(x, dim)
    out = torch.linalg.vector_norm(_without(x), 2 if order is None else order, axes, keepdim)
    return _mark(out, x.isnan().all(axes, keepdim=keepdim))


def _logsumexp(func: Any, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    axes = _axes(x, dim)
    out = torch.logsumexp(_without(x, -INFINITY), axes, keepdim)
    return _mark(out, x.isnan().all(axes, keepdim=keepdim))


def _product(func: Any, x: Tensor, dim: int, keepdim: bool = False, **options: Any) -> Tensor:
    return _mark(torch.prod(_without(x, 1.0), dim, keepdim), x.isnan().all(dim, keepdim=keepdim))


def _cumulative(func: Any, x: Tensor, dim: int, **options: Any) -> Tensor:
    neutral = 0.0 if func.overloadpacket is aten.cumsum else 1.0
    return _mark(func(_without(x, neutral), dim), x.isnan())


def _weight_norm(func: Any, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    axes = tuple(a for a in range(v.dim()) if a != dim)
    norm = _sum_of(v**2, axes, True).sqrt()
    return v * (g / norm), norm


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mm: _mm,
    aten.bmm: _mm,
    aten.matmul: _mm,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.linear: _linear,
    aten.mv: _mv,
    aten.dot: _dot,
    aten._trilinear: _trilinear,
    aten._cdist_forward: _cdist,
    aten.convolution: _convolution,
    torch.ops.torchvision.deform_conv2d: _deformable,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten._softmax: _softmax,
    aten._log_softmax: _softmax,
    aten._safe_softmax: _softmax,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.var: _variance,
    aten.std: _variance,
    aten.var_mean: _variance,
    aten.std_mean: _variance,
    aten.max: _extreme,
    aten.min: _extreme,
    aten.amax: _extreme,
    aten.amin: _extreme,
    aten.linalg_vector_norm: _vector_norm,
    aten.norm: _vector_norm,
    aten.logsumexp: _logsumexp,
    aten.prod: _product,
    aten.cumsum: _cumulative,
    aten.cumprod: _cumulative,
    aten._weight_norm_interface: _weight_norm,
}
# Newer than the oldest torch supported, where the norm is recorded as its parts.
if hasattr(aten, "_fused_rms_norm"):
    _RULES[aten._fused_rms_norm] = _rms_norm
