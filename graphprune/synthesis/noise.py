"""Noise as smooth as pictures and sounds are."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def smooth(noise: Tensor) -> Tensor:
    """White noise (samples, channels, places...) of deviation 1 with amplitudes that fall with the frequency along the
    axes from 2 on, of deviation 1 too; without such axes as it is.

    No frequency is lost, so anything can be made of it. A gradient with regard to the noise changes large parts of a
    picture rather than single pixels, and gets to the statistics of batch norms in a third of the steps.
    """
    if noise.dim() < 3:
        return noise
    axes = tuple(range(2, noise.dim()))
    sizes = tuple(noise.shape[2:])
    factors = _factors(sizes).to(noise.device, noise.real.dtype if noise.is_complex() else noise.dtype)
    found: Tensor
    if noise.is_complex():
        found = torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * factors, dim=axes)
    else:
        half = factors[..., : sizes[-1] // 2 + 1]
        found = torch.fft.irfftn(torch.fft.rfftn(noise, dim=axes) * half, s=sizes, dim=axes)
    return found


@functools.lru_cache(maxsize=16)
def _factors(sizes: tuple[int, ...]) -> Tensor:
    """1 / frequency, of places of these sizes, with a mean square of 1; that of the mean is the lowest other one's."""
    squares = torch.zeros(())
    for size in sizes:
        squares = squares[..., None] + torch.fft.fftfreq(size).square()
    found = squares.sqrt().clamp_min(1 / max(sizes)).reciprocal()
    return found / found.square().mean().sqrt()
