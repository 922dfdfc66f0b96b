"""Neuron and filter pruning as textbooks write them, filter by filter and neuron by neuron."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune import GraphPruneError
from graphprune.planning.allocation.rounding import nearest


class Mixed(nn.Module):
    """Convolutions, a residual stream that both kinds write, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.wise = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.embed, self.out = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)
        self.up, self.down = nn.Linear(12, 14), nn.Linear(14, 12)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(self.wise(self.b(self.a(x).relu()).relu()).relu()).mean((2, 3))
        out: Tensor = self.out(stream + self.down(self.up(stream).relu()))
        return out


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def least(scores: list[float], count: int) -> tuple[int, ...]:
    """Positions of the smallest scores; of equal ones the later go first."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count]))


@pytest.mark.parametrize(("criterion", "p"), [("l1", 1), ("l2", 2)])
def test_filters_of_smallest_norm_go(criterion: str, p: int) -> None:
    net = Mixed().eval()
    plan = graphprune.plan(net, X, 0.5, granularity="filters", criterion=criterion, round_to=1)
    first = [sum(abs(v) ** p for v in f.flatten().tolist()) ** (1 / p) for f in net.a.weight]
    assert plan.removed["a.weight"] == {0: least(first, 5)}
    pair = [
        sum(sum(abs(v) ** p for v in layer.weight[i].flatten().tolist()) ** (1 / p) for layer in (net.b, net.wise)) / 2
        for i in range(8)
    ]
    assert plan.removed["b.weight"] == {0: least(pair, 4), 1: least(first, 5)}
    assert {name.partition(".")[0] for name in plan.removed} == {"a", "b", "wise", "embed"}
    small = graphprune.prune(net, X, 0.5, granularity="filters", criterion=criterion, round_to=1)
    assert small.a.out_channels == 5 and small.up.out_features == 14 and small.embed.out_channels == 12  # type: ignore[union-attr]


def test_neurons_of_smallest_norm_go_and_their_consumers_follow() -> None:
    net = Mixed().eval()
    small = graphprune.prune(net, X, 0.5, granularity="neurons", criterion="l2", round_to=1)
    rows = [math.sqrt(sum(v * v for v in row.tolist())) for row in net.up.weight]
    kept = [i for i in range(14) if i not in least(rows, 7)]
    assert torch.equal(small.up.weight, net.up.weight[kept]) and torch.equal(small.up.bias, net.up.bias[kept])  # type: ignore[union-attr, arg-type]
    assert torch.equal(small.down.weight, net.down.weight[:, kept])  # type: ignore[union-attr, arg-type]
    assert small.a.out_channels == 10 and small.embed.out_channels == 12  # type: ignore[union-attr]
    with torch.no_grad():
        for i in range(14):
            if i not in kept:
                net.up.weight[i] = 0
                net.up.bias[i] = 0
        torch.testing.assert_close(small(X), net(X))


def test_neurons_of_smallest_activation_variance_go() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    data = [torch.randn(20, 6) for _ in range(3)]
    options: dict[str, Any] = {"granularity": "neurons", "criterion": "activation_variance", "round_to": 1}
    plan = graphprune.plan(net, data[0], 0.5, data=data, **options)
    inputs = torch.cat(data)
    for layer, size in ((0, 12), (2, 9)):
        values = F.relu(net[: layer + 1](inputs)).tolist()
        variances = []
        for j in range(size):
            mean = sum(row[j] for row in values) / len(values)
            variances.append(sum((row[j] - mean) ** 2 for row in values) / len(values))
        assert plan.removed[f"{layer}.weight"][0] == least(variances, nearest(size / 2))


def test_a_stream_that_both_write_is_neither_and_both_together_are_less_than_channels() -> None:
    net = Mixed().eval()
    cut = {
        kind if isinstance(kind, str) else "both": {
            g.name.partition(".")[0] for g in graphprune.plan(net, X, 0.5, granularity=kind).groups if g.kept < g.size
        }
        for kind in ("filters", "neurons", ["filters", "neurons"], "channels", "filter")
    }
    assert cut["filters"] == cut["filter"] == {"a", "b"} and cut["neurons"] == {"up"}
    assert cut["both"] == {"a", "b", "up"} and cut["both"] < cut["channels"]
    with pytest.raises(GraphPruneError, match=r"unknown granularity 'neurones'; did you mean 'neurons'"):
        graphprune.plan(net, X, 0.5, granularity="neurones")


def test_grouped_convolutions_are_cut_as_auto_does() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1))
    both = [graphprune.plan(net.eval(), X, 0.5, granularity=kind).removed for kind in ("filters", "auto")]
    assert both[0] == both[1] and both[0]
