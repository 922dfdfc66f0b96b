"""Planning comes to an end, with a reason for what it leaves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import graphprune


class Divided(nn.Module):
    """Heads and a temperature, both from one width: that of the heads' features follows where heads go, and then the
    temperature would be another."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.width, self.scaled = 2, 8, scaled
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        h = h / math.sqrt(self.width) if self.scaled else h
        out: Tensor = self.last(self.layer(h).view(x.shape[0], -1, self.heads, self.width // self.heads).flatten(2))
        return out


@pytest.mark.parametrize("output", ["module", "hybrid"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_number_that_follows_another_is_held_with_it(scaled: bool, output: str) -> None:
    net, x = Divided(scaled).eval(), torch.randn(2, 5, 6)
    plan = graphprune.plan(net, x, 0.5, output=output)
    assert "first.weight" in plan.removed
    if scaled and output == "module":
        assert 0 not in plan.removed["layer.weight"]
        assert any(line.startswith("layer.weight axis 0") and "factor" in line for line in plan.frozen)
    assert graphprune.verify(net, plan.apply(net), plan, x).passed
