"""Groups written by hand, and every criterion as the loop over units that its formula says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from graphprune.dependency.groups import Group, Member, Role


def every(count: int) -> np.ndarray:
    """Positions of `count` ordinary channels: unit u at index u."""
    return np.arange(count, dtype=np.int64)[:, None]


def blocks(units: int, k: int) -> np.ndarray:
    """Positions of `units` heads of k neighbouring features."""
    return np.arange(units * k, dtype=np.int64).reshape(units, k)


def group(members: Iterable[tuple[str, int, np.ndarray, Role]], index: int = 0, name: str = "conv.weight[0]") -> Group:
    made = tuple(Member(parameter, axis, positions, role) for parameter, axis, positions, role in members)
    return Group(index, name, "channel", made[0].positions.shape[0], made, "structure")


def unit_values(tensor: Tensor, axis: int, positions: Sequence[int]) -> list[complex]:
    """All elements at the given indices of an axis, as Python numbers."""
    values: list[complex] = []
    for position in positions:
        values.extend(tensor.detach().select(axis, int(position)).reshape(-1).tolist())
    return values


def norm(tensor: Tensor, axis: int, positions: Sequence[int], p: float) -> float:
    values = unit_values(tensor, axis, positions)
    if p == 1:
        return math.fsum(abs(v) for v in values)
    return math.fsum(abs(v) ** p for v in values) ** (1 / p)


def mean_norms(tensors: dict[str, Tensor], members: Sequence[Member], p: float) -> list[float]:
    size = members[0].positions.shape[0]
    return [
        sum(norm(tensors[m.parameter], m.axis, m.positions[u], p) for m in members) / len(members) for u in range(size)
    ]


def distance_sums(tensor: Tensor, axis: int, positions: np.ndarray) -> list[float]:
    rows = [unit_values(tensor, axis, unit) for unit in positions]
    return [sum(math.sqrt(math.fsum(abs(a - b) ** 2 for a, b in zip(r, s, strict=True))) for s in rows) for r in rows]


def lamp(magnitudes: Sequence[float]) -> list[float]:
    """s_u^2 over the sum of s_v^2 of every v that ranks no lower: larger, or equal with an index no higher."""
    scores = []
    for u, s in enumerate(magnitudes):
        rest = sum(t * t for v, t in enumerate(magnitudes) if t > s or (t == s and v <= u))
        scores.append(s * s / rest if rest > 0 else 0.0)
    return scores


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)
