"""Backward elimination against refitting from scratch at every step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.importance import reconstruction as module
from graphprune.importance.reconstruction import Problem, eliminate, scores_in_order


def make(problems: int, features: list[list[int]], others: int, outputs: int) -> Problem:
    """Units as given, and `others` features that never go."""
    total = sum(map(len, features)) + others
    x = torch.randn(problems, 4 * total, total, dtype=torch.float64) @ torch.randn(total, total, dtype=torch.float64)
    weights = torch.randn(problems, total, outputs, dtype=torch.float64)
    return Problem(x.mT @ x / x.shape[1], weights, torch.tensor(features), 1.0 + float(torch.rand(())))


def unexplained(problem: Problem, gone: list[int]) -> float:
    """Error of the best fit without the features of these units, relative; one small system solved from scratch."""
    lost = set(problem.features[gone].flatten().tolist())
    keep = [i for i in range(problem.weights.shape[1]) if i not in lost]
    error = 0.0
    for covariance, weights in zip(problem.covariance, problem.weights, strict=True):
        cross = covariance @ weights
        fit = torch.linalg.solve(covariance[keep][:, keep], cross[keep])
        error += float((weights * cross).sum() - (fit * cross[keep]).sum())
    return error / problem.energy


CASES = [
    [make(1, [[0], [1], [2], [3], [4]], 0, 3)],
    [make(1, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], 2, 3)],
    [make(3, [[0, 1], [2, 3], [4, 5], [6, 7]], 1, 2)],
    [make(1, [[0], [1], [2], [3]], 0, 3), make(1, [[5, 4], [2, 3], [1, 0], [7, 6]], 3, 2)],
]


@pytest.mark.parametrize("problems", CASES)
def test_each_step_removes_the_cheapest_at_its_price(problems: list[Problem]) -> None:
    units = len(problems[0].features)
    order, costs = eliminate(problems, units)
    assert sorted(order) == list(range(units))
    gone: list[int] = []
    before = 0.0
    for unit, cost in zip(order, costs, strict=True):
        prices = {
            u: sum(unexplained(p, [*gone, u]) for p in problems) - before for u in range(units) if u not in gone
        }
        if len(prices) > 1:
            assert prices[unit] == pytest.approx(min(prices.values()), rel=1e-6)
        assert cost == pytest.approx(prices[unit], rel=1e-6)
        gone.append(unit)
        before += prices[unit]


def test_large_groups_lose_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(1, [[i] for i in range(12)], 0, 3)
    single = eliminate([problem], 12)[0]
    monkeypatch.setattr(module, "_SHARE", 4)
    order, costs = eliminate([problem], 12)
    assert sorted(order) == list(range(12)) and all(math.isfinite(c) for c in costs)
    first = {u: unexplained(problem, [u]) for u in range(12)}
    assert order[:3] == sorted(first, key=first.__getitem__)[:3]
    assert single[0] == order[0]


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
