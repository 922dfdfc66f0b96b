"""Indices that the code lists, `x[:, [0, 3]]`: what lies beyond what they count can go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune

CHANNELS = 8


class Listed(nn.Module):
    def __init__(self, indices: list[int] | Tensor) -> None:
        super().__init__()
        self.indices = indices
        self.first, self.second = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(len(indices), 4, 1)
        self.third = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.second(x[:, self.indices]) + self.third(x)


class MultiQuery(nn.Module):
    """One projection for the queries of all heads and one key and one value, taken apart by a list."""

    def __init__(self, heads: int = 4, features: int = 6) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.qkv, self.out = nn.Linear(12, (heads + 2) * features), nn.Linear(heads * features, 12)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).view(*x.shape[:2], self.heads + 2, self.features)
        q, k, v = (part.transpose(1, 2) for part in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        mixed = torch.softmax(q @ k.mT * 0.4, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.features))


def free_positions(indices: list[int]) -> int:
    """By trying: how many channels could go while every listed index still finds the channel that it found."""
    free = 0
    for gone in range(CHANNELS):
        left = [c for c in range(CHANNELS) if c != gone]
        same = all(-len(left) <= i < len(left) and left[i] == list(range(CHANNELS))[i] for i in indices)
        free += same
    return free


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("indices", [[0], [2, 0], [1, 1], [-1], [-3, -2], [0, -1], [7], [-8], [3, 5, 4]])
def test_what_lies_beyond_can_go(indices: list[int], as_tensor: bool) -> None:
    model = Listed(torch.tensor(indices) if as_tensor else indices).eval()
    x = torch.randn(2, 3, 6, 6)
    free = free_positions(indices)
    plan = graphprune.plan(model, x, 0.99)
    gone = plan.removed.get("first.weight", {}).get(0, ())
    assert free - 1 <= len(gone) <= free  # at least one unit of a group stays
    small = graphprune.prune(model, x, 0.99)
    assert small.first.weight.shape[0] == CHANNELS - len(gone)


def test_heads_beside_one_listed_key_and_value() -> None:
    model, x = MultiQuery().eval(), torch.randn(2, 5, 12)
    plan = graphprune.plan(model, x, 0.5, granularity="heads")
    small = graphprune.prune(model, x, 0.5, granularity="heads")
    assert small.heads == 2 and small.qkv.weight.shape[0] == 4 * 6
    assert graphprune.verify(model, small, plan, x).passed
