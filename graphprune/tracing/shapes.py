"""Results of common calls on the meta device, without asking torch.

A recording run on the meta device needs shapes only. torch computes them for batch norms and pointwise operators in
Python, which takes longer than the arithmetic would; here it takes one allocation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_LIKE_FIRST = frozenset(
    getattr(aten, name).default
    for name in (
        "relu sigmoid tanh silu hardswish hardsigmoid gelu leaky_relu elu hardtanh softplus "
        "relu_ sigmoid_ tanh_ silu_ hardswish_ hardsigmoid_ leaky_relu_ elu_ hardtanh_"
    ).split()
)
_BINARY = frozenset((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor))
_BINARY_IN_PLACE = frozenset((aten.add_.Tensor, aten.mul_.Tensor))


def shape_rule(target: Any) -> Callable[..., Any] | None:
    """What gives the results of calls of `target` from their arguments, meta tensors, or None where torch has to be
    asked; None where it has to be asked always."""
    if target in _LIKE_FIRST:
        return functools.partial(_pointwise, target._schema.is_mutable)
    if target in _BINARY or target in _BINARY_IN_PLACE:
        return functools.partial(_of_two, target in _BINARY_IN_PLACE)
    return _KNOWN.get(target)


def _pointwise(in_place: bool, first: Tensor, *_: Any) -> Tensor | None:
    if not first.is_meta or not first.is_floating_point():
        return None
    if in_place:
        return first
    return _like(first) if _is_dense(first) else None


def _of_two(in_place: bool, first: Any, second: Any, *_: Any) -> Tensor | None:
    if in_place:
        return first if _fits(first, second) and first.is_floating_point() and _is_dense(first) else None
    if _covers(first, second):
        return _pointwise(False, first)
    return _pointwise(False, second) if _covers(second, first) else None


def _batch_norm(x: Tensor, *_: Any) -> tuple[Tensor, ...] | None:
    if not x.is_contiguous():
        return None
    return _like(x), *(torch.empty_strided((0,), (1,), dtype=x.dtype, device="meta") for _ in range(2))


def _layer_norm(
    x: Tensor, sizes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    shape, count = x.shape, len(sizes)
    own = [t for t in (weight, bias) if t is not None]
    if not (count and x.is_meta and x.is_floating_point()) or list(shape[-count:]) != list(sizes) or 0 in shape:
        return None
    if any(not t.is_meta or t.dtype is not x.dtype or t.shape != shape[-count:] for t in own):
        return None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    statistics = (torch.empty((*shape[:-count], *[1] * count), dtype=wide, device="meta") for _ in range(2))
    return torch.empty(shape, dtype=x.dtype, device="meta"), *statistics  # type: ignore[return-value]


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """A bias of one axis added to a product of matrices, as linear layers make it."""
    if bias.dim() != 1 or a.dim() != 2 or b.dim() != 2 or bias.shape[0] != b.shape[1] or bias.dtype != a.dtype:
        return None
    return _mm(a, b) if bias.is_meta else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """A linear layer without its parts."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1:] != weight.shape[1:] or x.dtype != weight.dtype:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        return None
    if not (x.is_meta and x.is_floating_point() and x.is_contiguous()) or 0 in x.shape:
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        return None
    if not (a.is_meta and b.is_meta and a.is_floating_point()):
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor | None:
    """Contiguous tensors that are as long as each other along every other axis."""
    shape = list(tensors[0].shape) if tensors else []
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    dtype, total = tensors[0].dtype, 0
    for tensor in tensors:
        own = list(tensor.shape)
        if len(own) != len(shape) or own[:axis] != shape[:axis] or own[axis + 1 :] != shape[axis + 1 :]:
            return None
        if tensor.dtype is not dtype or not tensor.is_meta or not tensor.is_contiguous() or 0 in own:
            return None
        total += own[axis]
    shape[axis] = total
    return torch.empty(shape, dtype=dtype, device="meta")


def _max_pool(
    x: Tensor, kernel: list[int], stride: list[int] = [], padding: list[int] = [0], dilation: list[int] = [1],  # noqa: B006
    ceil: bool = False,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Values and their places, of an image or a batch of them; torch is asked about windows that do not fit."""
    if x.dim() not in (3, 4) or not x.is_meta or not x.is_floating_point() or not x.is_contiguous() or 0 in x.shape:
        return None
    sizes = []
    for at, n in zip((-2, -1), x.shape[-2:], strict=True):
        k, p, d = (values[at if len(values) > 1 else 0] for values in (kernel, padding, dilation))
        s = (stride[at if len(stride) > 1 else 0]) if stride else k
        if min(k, s, d) < 1 or p < 0 or 2 * p > k:
            return None
        out = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        if ceil and (out - 1) * s >= n + p:  # the last window begins inside
            out -= 1
        if out < 1:
            return None
        sizes.append(out)
    shape = (*x.shape[:-2], *sizes)
    return torch.empty(shape, dtype=x.dtype, device="meta"), torch.empty(shape, dtype=torch.int64, device="meta")


def _mean(x: Tensor, axes: list[int] | None, keepdim: bool = False) -> Tensor | None:
    """The mean over some axes."""
    if not axes or not x.is_meta or not x.is_floating_point() or not x.is_contiguous():
        return None
    rank = x.dim()
    gone = {axis % rank for axis in axes if -rank <= axis < rank}
    if len(gone) < len(axes):
        return None
    shape = [1 if axis in gone else n for axis, n in enumerate(x.shape) if keepdim or axis not in gone]
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor | None:  # fmt: skip
    """A plain convolution of matching operands; torch is asked about everything else, and says what is wrong."""
    spatial = weight.dim() - 2
    if (
        transposed
        or x.dim() != weight.dim()
        or not x.is_meta
        or not x.is_floating_point()
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or x.dtype != weight.dtype
        or (bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]))
        or not (len(stride) == len(padding) == len(dilation) == spatial)
        or not (x.is_contiguous() and weight.is_contiguous())
    ):
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if min(out, default=0) < 1:
        return None
    return torch.empty((x.shape[0], weight.shape[0], *out), dtype=x.dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    # not torch.empty_like, which is a Python decomposition on this device
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _covers(a: Any, b: Any) -> bool:
    """The result of a pointwise operator on the two looks like `a`."""
    if not _fits(a, b):
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    if a.shape == b.shape and a.stride() == b.stride():
        return _is_dense(a)
    # one axis says nothing of the order of axes in memory
    return b.is_contiguous() and len([n for n in b.shape if n > 1]) < 2 and 1 not in a.shape[1:] and _is_dense(a)


def _fits(a: Any, b: Any) -> bool:
    """Two tensors of one kind, of which the second may be broadcast to the first."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta and b.is_meta and a.dtype == b.dtype):
        return False
    return a.shape == b.shape or _broadcasts(b.shape, a.shape)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or bool(aten.is_non_overlapping_and_dense.default(x))


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    if len(small) > len(large) or 0 in large:
        return False
    return all(n == 1 or n == m for n, m in zip(reversed(small), reversed(large), strict=False))


_KNOWN: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.convolution.default: _convolution,
    aten.mean.dim: _mean,
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.cat.default: _cat,
    aten.max_pool2d_with_indices.default: _max_pool,
}
