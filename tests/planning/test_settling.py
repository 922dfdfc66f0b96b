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


class Aligned(nn.Module):
    """Code that takes multiples only, as kernels that load several numbers at once do."""

    def __init__(self, first: int, second: int, step: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.a, self.b, self.c = nn.Linear(6, first), nn.Linear(first, second), nn.Linear(second, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if x.shape[1] % self.step != 0:
            raise ValueError(f"{x.shape[1]} is no multiple of {self.step}")
        x = self.b(x).relu()
        if x.shape[1] % self.step != 0:
            raise ValueError(f"{x.shape[1]} is no multiple of {self.step}")
        out: Tensor = self.c(x)
        return out


@pytest.mark.parametrize(("first", "second", "step"), [(28, 20, 4), (24, 36, 6), (48, 32, 8), (40, 40, 5)])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.35, 0.2, 0.08])
def test_a_budget_settles_on_widths_that_the_code_takes(first: int, second: int, step: int, share: float) -> None:
    """Against trying all of them: met within 1 % where any two widths do, and refused only where none fit."""
    net, x = Aligned(first, second, step).eval(), torch.randn(2, 6)
    cost = {
        (a, b): 6 * a + a * b + 3 * b for a in range(step, first + 1, step) for b in range(step, second + 1, step)
    }
    used = {widths: macs / cost[first, second] / share for widths, macs in cost.items()}
    fitting = [u for u in used.values() if u <= 1]
    if not fitting:
        with pytest.raises(graphprune.GraphPruneError, match="budget"):
            graphprune.plan(net, x, budget=graphprune.Budget(macs=share))
        return
    small = graphprune.prune(net, x, budget=graphprune.Budget(macs=share))
    found = used[small.a.out_features, small.b.out_features]
    assert found <= 1
    assert found >= (0.99 if max(fitting) >= 0.99 else 0.8 * max(fitting))
