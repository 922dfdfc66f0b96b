"""The criterion "reconstruction": what it makes of the order in which units go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.importance.reconstruction import scores_in_order


def test_scores_follow_the_order() -> None:
    scores = scores_in_order([2, 0, 3, 1], [0.5, 0.5, 0.1, 4.0])
    assert np.argsort(-scores, kind="stable").tolist() == [1, 3, 0, 2]
    assert scores == pytest.approx([0.5, 4.0, 0.5, 0.5])
    assert np.argsort(scores_in_order([1, 2, 0], [0.0, 0.0, 0.0])).tolist() == [1, 2, 0]


def test_a_duplicate_costs_nothing_and_the_other_one_then_counts_double() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = net[0].weight[0], net[0].bias[0]
    x = torch.randn(200, 3)
    plan = graphprune.plan(net, x[:1], 0.25, criterion="reconstruction", data=[x])
    assert plan.removed["0.weight"][0] in ((0,), (2,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (m(x).reshape(n, t, 2, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


def test_groups_that_no_layer_reads_are_scored_by_their_weights() -> None:
    net, x = Attention(), torch.randn(5, 6, 8)
    plan = graphprune.plan(net, x, 0.5, criterion="reconstruction", data=[x])
    assert len(plan.removed["q.weight"][0]) == len(plan.removed["v.weight"][0]) == 4


def test_without_data_the_error_names_it() -> None:
    with pytest.raises(GraphPruneError, match="criterion 'reconstruction' needs data: pass data="):
        graphprune.plan(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.randn(1, 2), criterion="reconstruction")
