"""Pruning in steps: where it ends, what lies on the way, and what happens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Budget, GraphPruneError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 20, 3, padding=1)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def made() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize(
    ("schedule", "widths"),
    [
        ("linear", [(14, 17), (12, 15), (10, 12), (8, 10)]),
        ("cubic", [(16, 20), (15, 19), (13, 16), (8, 10)]),
        ("one-shot", [(8, 10)] * 4),
    ],
)
def test_each_step_removes_its_share_of_the_original(schedule: str, widths: list[tuple[int, int]]) -> None:
    net, x = made()
    seen = []

    def train(model: nn.Module, step: int) -> None:
        assert isinstance(model.norm, nn.BatchNorm2d)  # folded at the end only
        seen.append((model.a.out_channels, model.b.out_channels))

    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = graphprune.prune_gradually(net, x, 0.5, steps=4, schedule=schedule, train=train, round_to=1)
    assert seen == widths and not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_one_step_is_prune() -> None:
    net, x = made()
    for options in ({"ratio": 0.5}, {"budget": Budget(macs=0.5)}):
        once = graphprune.prune(net, x, **options, recover=None)
        gradual = graphprune.prune_gradually(net, x, steps=1, **options)
        assert torch.allclose(once(x), gradual(x), atol=1e-6)


def test_a_budget_is_approached_from_the_original_and_met() -> None:
    net, x = made()
    dense = graphprune.count(net, x)
    seen: list[float] = []

    def train(model: nn.Module, step: int) -> None:
        seen.append(graphprune.count(model, x).macs / dense.macs)

    end = Budget(macs=0.4, params=round(0.5 * dense.parameters))
    small = graphprune.prune_gradually(net, x, budget=end, steps=3, train=train, criterion="l1", round_to=1)
    assert all(0.9 * most < found <= most for found, most in zip(seen, (0.8, 0.6, 0.4), strict=True))
    assert graphprune.count(small, x).parameters <= 0.5 * dense.parameters


def test_later_steps_choose_from_the_weights_that_training_left() -> None:
    net, x = made()

    def train(model: nn.Module, step: int) -> nn.Module:
        if step == 1:
            with torch.no_grad():
                model.b.weight[:5] *= 1e-3  # these go next
                model.b.bias[:5] = 7.0
        return model

    small = graphprune.prune_gradually(net, x, 0.5, steps=2, train=train, ignore=net.a, round_to=1)
    assert small.a.out_channels == 16 and small.b.out_channels == 10
    assert not (small.b.bias == 7.0).any()


def test_recovery_at_every_step_repairs_what_is_redundant() -> None:
    net, x = made()
    with torch.no_grad():
        net.b.weight[10:], net.b.bias[10:] = net.b.weight[:10], net.b.bias[:10]
    small = graphprune.prune_gradually(
        net, x[:1], 0.5, steps=5, ignore="a", criterion="reconstruction", data=[x], recover="least_squares", round_to=1
    )
    assert small.b.out_channels == 10
    assert torch.allclose(small(x), net(x), atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5, "budget": Budget(macs=0.5)}, "ratio and budget exclude each other"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"schedule": "slow"}, "unknown schedule 'slow'"),
        ({"ratio": 1.0}, r"ratio: expected a number in \[0, 1\)"),
        ({"budget": 0.5}, "budget: expected a graphprune.Budget"),
        ({"train": 3}, "train: expected a function"),
        ({"train": lambda model, step: 3}, "train: expected it to return a model or None, got int"),
        ({"ignore": nn.Linear(1, 1)}, "ignore: Linear is no module of this model"),
        ({"recover": "least_squares"}, "recover='least_squares' needs inputs"),
        ({"criterion": "wanda"}, "needs data"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    net, x = made()
    with pytest.raises(GraphPruneError, match=message):
        graphprune.prune_gradually(net, x, **arguments)
