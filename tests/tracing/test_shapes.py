"""Shapes worked out without torch are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphprune.tracing.shapes import shape_rule

aten = torch.ops.aten


def shape_only(target: Any, args: tuple[Any, ...]) -> Any:
    """The result of `target(*args)` for meta tensors, or None where torch has to be asked."""
    found = shape_rule(target)
    return None if found is None else found(*args)


def assert_like_torch(target: Any, *args: Any) -> None:
    """Where `shape_only` answers, torch gives the same shape, strides and dtype."""
    found = shape_only(target, args)
    if found is not None:
        expected = target(*args)
        several = (found, expected) if isinstance(found, tuple) else ((found,), (expected,))
        for mine, theirs in zip(*several, strict=True):
            assert (mine.shape, _strides(mine), mine.dtype) == (theirs.shape, _strides(theirs), theirs.dtype)


def _strides(tensor: Tensor) -> list[int]:
    """Of the axes longer than 1: the others' say nothing."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@given(
    spatial=st.integers(1, 3), groups=st.integers(1, 3), inner=st.integers(1, 3), outer=st.integers(1, 3),
    size=st.integers(1, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), bias=st.booleans(),
)  # fmt: skip
def test_convolutions(
    spatial: int, groups: int, inner: int, outer: int, size: int, kernel: int, stride: int, padding: int, dilation: int,
    bias: bool,
) -> None:  # fmt: skip
    x = meta(2, groups * inner, *[size] * spatial)
    weight = meta(groups * outer, inner, *[kernel] * spatial)
    settings = [[n] * spatial for n in (stride, padding, dilation)]
    args = (x, weight, meta(groups * outer) if bias else None, *settings, False, [0] * spatial, groups)
    fits = size + 2 * padding >= dilation * (kernel - 1) + 1
    assert (shape_only(aten.convolution.default, args) is not None) == fits
    assert_like_torch(aten.convolution.default, *args)


@pytest.mark.parametrize(
    ("x", "weight", "groups"),
    [
        (meta(1, 4, 5, 5), meta(6, 3, 1, 1), 1),  # channels do not match
        (meta(4, 5, 5), meta(6, 4, 1, 1), 1),  # no batch
        (meta(1, 4, 5, 5), meta(6, 4, 1, 1, dtype=torch.float64), 1),
        (meta(1, 4, 5, 5), meta(5, 2, 1, 1), 2),  # no equal groups
        (meta(1, 4, 5, 5).to(memory_format=torch.channels_last), meta(6, 4, 1, 1), 1),
    ],
)
def test_torch_is_asked_about_unusual_convolutions(x: Tensor, weight: Tensor, groups: int) -> None:
    args = (x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups)
    assert shape_only(aten.convolution.default, args) is None


@given(shapes=st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=2, max_size=2), half=st.booleans())
def test_pointwise_operators_of_two(shapes: list[list[int]], half: bool) -> None:
    a, b = meta(*shapes[0]), meta(*shapes[1], dtype=torch.float16 if half else torch.float32)
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        assert shape_only(aten.add.Tensor, (a, b)) is None
        return
    assert_like_torch(aten.add.Tensor, a, b)
    assert_like_torch(aten.mul.Tensor, a.mT if a.dim() > 1 else a, b)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "hardtanh", "leaky_relu_", "sigmoid_"])
def test_pointwise_operators_of_one(name: str) -> None:
    for x in (meta(2, 3, 4), meta(2, 3, 4).transpose(0, 2), meta(2, 1, 4).expand(2, 3, 4), meta(2, 6, 4)[:, ::2]):
        assert_like_torch(getattr(aten, name).default, x)


@given(shape=st.lists(st.integers(0, 3), max_size=4), axes=st.lists(st.integers(-4, 3), max_size=3), keep=st.booleans())
def test_means(shape: list[int], axes: list[int], keep: bool) -> None:
    x = meta(*shape)
    try:
        aten.mean.dim(x, axes, keep)
    except (IndexError, RuntimeError):
        assert shape_only(aten.mean.dim, (x, axes, keep)) is None
        return
    assert_like_torch(aten.mean.dim, x, axes, keep)
    assert_like_torch(aten.mean.dim, x.mT if x.dim() > 1 else x, axes, keep)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), order=st.permutations(range(4)),
    other=st.permutations(range(4)), ones=st.sets(st.integers(0, 3)), short=st.integers(0, 4),
)  # fmt: skip
def test_pointwise_operators_of_two_that_lie_otherwise_in_memory(
    shape: list[int], order: list[int], other: list[int], ones: set[int], short: int
) -> None:
    def laid(sizes: list[int], axes: list[int]) -> Tensor:
        """A tensor of this shape whose axes lie in this order in memory."""
        here = [a for a in axes if a < len(sizes)]
        return meta(*(sizes[a] for a in here)).permute([here.index(a) for a in range(len(sizes))])

    a = laid(shape, order)
    small = [1 if axis in ones else n for axis, n in enumerate(shape)][-short:] if short else []
    b = laid(small, other)
    for target in (aten.add.Tensor, aten.mul_.Tensor):
        assert_like_torch(target, a, b)
    assert_like_torch(aten.mul.Tensor, b, a)
    assert shape_only(aten.add_.Tensor, (a, b)) is a


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), count=st.integers(1, 4), turned=st.booleans(),
    affine=st.integers(0, 2), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_layer_norms(shape: list[int], count: int, turned: bool, affine: int, dtype: torch.dtype) -> None:
    x = meta(*shape, dtype=dtype)
    x = x.mT if turned and x.dim() > 1 else x
    sizes = list(x.shape[-count:])
    own = [meta(*sizes, dtype=dtype) if k < affine else None for k in range(2)]
    assert shape_only(aten.native_layer_norm.default, (x, sizes, *own, 1e-5)) is not None
    assert_like_torch(aten.native_layer_norm.default, x, sizes, *own, 1e-5)
    wrong = [sizes[0] + 1, *sizes[1:]]
    assert shape_only(aten.native_layer_norm.default, (x, wrong, None, None, 1e-5)) is None


def test_the_narrower_operand_may_come_first() -> None:
    gate, x = meta(2, 3, 1, 1), meta(2, 3, 4, 4)
    assert shape_only(aten.mul.Tensor, (gate, x)).shape == x.shape
    assert shape_only(aten.mul_.Tensor, (gate, x)) is None
    assert shape_only(aten.mean.dim, (x, [2, 3], True)).shape == gate.shape


@given(
    rest=st.lists(st.integers(1, 3), max_size=3), lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    axis=st.integers(-4, 3), odd=st.booleans(),
)  # fmt: skip
def test_concatenation(rest: list[int], lengths: list[int], axis: int, odd: bool) -> None:
    at = axis % (len(rest) + 1)
    tensors = [meta(*rest[:at], n, *rest[at:]) for n in lengths]
    if odd:
        tensors[-1] = meta(*(n + 1 for n in tensors[-1].shape))
    try:
        aten.cat.default(tensors, axis)
    except (IndexError, RuntimeError):
        assert shape_only(aten.cat.default, (tensors, axis)) is None
        return
    assert_like_torch(aten.cat.default, tensors, axis)


def test_torch_is_asked_about_unusual_concatenations() -> None:
    x, last = meta(1, 4, 5, 5), torch.channels_last
    for other in (x.to(memory_format=last), meta(1, 4, 5, 5, dtype=torch.float64), meta(0)):
        assert shape_only(aten.cat.default, ([x, other], 1)) is None


@given(sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5), double=st.booleans())
def test_products_of_matrices(sizes: list[int], double: bool) -> None:
    a, b, bias = meta(*sizes[:2]), meta(*sizes[2:4]), meta(sizes[4], dtype=torch.float64 if double else torch.float32)
    fits = sizes[1] == sizes[2]
    assert (shape_only(aten.mm.default, (a, b)) is not None) == fits
    assert (shape_only(aten.addmm.default, (bias, a, b)) is not None) == (fits and sizes[3] == sizes[4] and not double)
    assert_like_torch(aten.mm.default, a, b)
    assert_like_torch(aten.mm.default, a, meta(sizes[3], sizes[2]).t())
    assert_like_torch(aten.addmm.default, bias, a, b)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    stride=st.lists(st.integers(1, 3), max_size=2), padding=st.integers(0, 2), dilation=st.integers(1, 2),
    ceil=st.booleans(), batch=st.booleans(),
)  # fmt: skip
def test_max_pools(
    size: tuple[int, int], kernel: list[int], stride: list[int], padding: int, dilation: int, ceil: bool, batch: bool
) -> None:
    args = (meta(*[2] * batch, 3, *size), kernel, stride, [padding], [dilation], ceil)
    try:
        aten.max_pool2d_with_indices.default(*args)
    except RuntimeError:
        assert shape_only(aten.max_pool2d_with_indices.default, args) is None
        return
    assert_like_torch(aten.max_pool2d_with_indices.default, *args)
    assert shape_only(aten.max_pool2d_with_indices.default, args) is not None
