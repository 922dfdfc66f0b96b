"""Smooth noise against sums written out."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch

from graphprune.synthesis.noise import smooth


def slowly(noise: torch.Tensor) -> torch.Tensor:
    """By the definition of Fourier's transform, place by place, of one sample and channel."""
    sizes = noise.shape
    places = list(itertools.product(*map(range, sizes)))

    def wave(k: tuple[int, ...], x: tuple[int, ...], sign: int) -> complex:
        return cmath.exp(sign * 2j * math.pi * sum(a * b / n for a, b, n in zip(k, x, sizes, strict=True)))

    def frequency(k: tuple[int, ...]) -> float:
        found = math.sqrt(sum(min(a, n - a) ** 2 / n**2 for a, n in zip(k, sizes, strict=True)))
        return max(found, 1 / max(sizes))

    power = sum(frequency(k) ** -2 for k in places) / len(places)
    parts = {k: sum(complex(noise[x]) * wave(k, x, -1) for x in places) for k in places}
    factor = {k: 1 / frequency(k) / math.sqrt(power) for k in places}
    found = [sum(parts[k] * factor[k] * wave(k, x, 1) for k in places) / len(places) for x in places]
    values = torch.tensor(found, dtype=torch.complex128).reshape(sizes)
    return values if noise.is_complex() else values.real


@pytest.mark.parametrize("shape", [(5,), (6,), (4, 3), (3, 6), (2, 3, 4), (1, 4)])
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_as_by_definition(shape: tuple[int, ...], kind: torch.dtype) -> None:
    torch.manual_seed(0)
    noise = torch.randn(2, 3, *shape, dtype=kind)
    found = smooth(noise)
    assert found.dtype == kind and torch.allclose(found[1, 2], slowly(noise[1, 2]))


def test_deviation_stays_and_neighbours_are_alike() -> None:
    torch.manual_seed(0)
    found = smooth(torch.randn(400, 2, 16, 16))
    assert abs(float(found.std()) - 1) < 0.05
    steps = (found[..., 1:] - found[..., :-1]).square().mean()
    assert 0 < float(steps) < 1, "2 of white noise"
    flat = torch.randn(3, 4)
    assert smooth(flat) is flat
