"""Tensors of other sizes made from an example, with values that the model may meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grown_batch(tensor: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """The first rows, or all and repeated ones whose floating-point values are scaled by factors from [0.5, 1)."""
    size = tensor.shape[0]
    if batch_size <= size:
        return tensor[:batch_size].clone()
    copies = math.ceil(batch_size / size)
    result = tensor.repeat(copies, *[1] * (tensor.ndim - 1))[:batch_size]
    if tensor.is_floating_point():
        factors = torch.rand(result[size:].shape, generator=generator) * 0.5 + 0.5
        result[size:] *= factors.to(tensor)
    return result


def sized(tensor: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A tensor of that shape: what the example has, cut, and beyond it slices of the example in random order.

    Integers and booleans are thus values of the example. Floating-point values beyond it are scaled by factors from
    [0.5, 1) unless the example has no more than two, as masks have. An axis of length 0 grows by random numbers, and
    by zeros where they are integers.
    """
    own = list(tensor.shape)
    if own == list(shape):
        return tensor
    if not tensor.numel():
        noise = torch.rand(tuple(shape), generator=generator) * 2 - 1
        return noise.to(tensor) if tensor.is_floating_point() else torch.zeros(tuple(shape)).to(tensor)
    result = tensor.detach()
    for axis, (size, wanted) in enumerate(zip(own, shape, strict=True)):
        more = torch.randint(size, (max(wanted - size, 0),), generator=generator)
        index = torch.cat([torch.arange(min(size, wanted)), more])
        result = result.index_select(axis, index.to(result.device))
    if tensor.is_floating_point() and tensor.unique().numel() > 2:
        factors = torch.rand(result.shape, generator=generator) * 0.5 + 0.5
        factors[tuple(slice(0, size) for size in own)] = 1
        result = result * factors.to(result)
    return result.clone()
