"""Budgets: exact costs, limits kept and nearly met, and the best choice where all choices can be tried."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Budget, GraphPruneError
from graphprune.planning.allocation import Limit, mac_costs, parameter_costs
from graphprune.planning.allocation.budget import Widths
from graphprune.plans.surgery import find_folds
from graphprune.plans.verification.rewrite import gone_components


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.na = nn.BatchNorm2d(4 * width)
        self.d = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False)
        self.nd = nn.BatchNorm2d(4 * width)
        self.b = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.nd(self.d(self.na(self.a(x)).relu())).relu())


class Mixed(nn.Module):
    """Residual stream, depthwise, concat, grouped convolution, flatten and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.left, self.right = nn.Conv2d(16, 12, 3, stride=2), nn.Conv2d(16, 20, 3, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, groups=4)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 24)
        self.fc = nn.Linear(24 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).relu())
        x = self.grouped(torch.cat([self.left(x), self.right(x)], 1).relu()).relu()
        x = x.flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.fc(self.out(y.transpose(1, 2).reshape(n, t, -1)).flatten(1))


X = torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_exact_costs_are_what_count_finds_in_the_pruned_network(ratio: float, fold: bool) -> None:
    net = Mixed().eval()
    graph = graphprune.trace(net, X)
    plan = graphprune.plan(net, X, ratio, fold_bn=fold)
    small = plan.apply(net)
    folds = find_folds(net, graph.trace) if fold else []
    gone = gone_components(graph, plan)
    found = graphprune.count(small, X)
    assert mac_costs(graph).exact(gone) == found.macs
    assert parameter_costs(graph, net, folds).exact(gone) == found.parameters
    assert mac_costs(graph).full == graphprune.count(net, X).macs


def test_slopes_are_those_of_the_value() -> None:
    graph = graphprune.trace(Mixed().eval(), X)
    rng = np.random.default_rng(0)
    for costs in (mac_costs(graph), parameter_costs(graph, Mixed(), [])):
        kept = rng.uniform(0.3, 1, len(graph.groups))
        slopes = costs.slopes(kept)
        for g in range(len(kept)):
            step = np.zeros_like(kept)
            step[g] = 1e-4
            numeric = (costs.value(kept + step) - costs.value(kept - step)) / 2e-4
            assert slopes[g] == pytest.approx(numeric, rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("criterion", ["l2", "random", "reconstruction"])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_budgets_are_kept_and_nearly_met(kind: str, share: float, criterion: str) -> None:
    net = Mixed().eval()
    small = graphprune.prune(net, X, budget=Budget(**{kind: share}), criterion=criterion, data=[X])
    before, after = graphprune.count(net, X), graphprune.count(small, X)
    used = after.macs / before.macs if kind == "macs" else after.parameters / before.parameters
    assert 0.99 * share <= used <= share


def test_two_budgets_at_once_and_counts() -> None:
    net = Mixed().eval()
    dense = graphprune.count(net, X)
    budget = Budget(macs=int(0.6 * dense.macs), params=0.4)
    small = graphprune.count(graphprune.prune(net, X, budget=budget), X)
    shares = small.macs / (0.6 * dense.macs), small.parameters / (0.4 * dense.parameters)
    assert 0.99 <= max(shares) <= 1


@pytest.mark.parametrize("round_to", [1, 4])
def test_no_group_loses_more_than_max_ratio(round_to: int) -> None:
    net = Mixed().eval()
    options: dict[str, Any] = {"criterion": "random", "round_to": round_to, "max_ratio": 0.6}
    plans = [
        graphprune.plan(net, X, budget=Budget(macs=0.5), **options),
        graphprune.plan(net, X, 0.9, **options),
        graphprune.plan(net, X, 0.8, scope="global", **options),
    ]
    for plan in plans:
        assert all(g.size - g.kept <= 0.6 * g.size for g in plan.groups)
        assert any(g.kept < g.size for g in plan.groups)
    assert all(g.kept % round_to == 0 for g in plans[0].groups if g.kept < g.size and g.name.startswith("blocks"))


def test_a_budget_of_everything_removes_nothing() -> None:
    assert graphprune.plan(Mixed().eval(), X, budget=Budget(macs=1.0)).empty


class _Product:
    """cost = sum over chains of width[i] * width[i + 1], with the ends fixed: what a chain of layers costs."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes, float)

    @property
    def full(self) -> float:
        return self.value(np.ones(len(self.sizes)))

    def value(self, kept: np.ndarray) -> float:
        w = np.concatenate([[3.0], kept * self.sizes, [5.0]])
        return float((w[1:] * w[:-1]).sum())

    def slopes(self, kept: np.ndarray) -> np.ndarray:
        w = np.concatenate([[3.0], kept * self.sizes, [5.0]])
        return (w[2:] + w[:-2]) * self.sizes

    def curve(self, group: int, kept: np.ndarray, fractions: np.ndarray) -> np.ndarray:
        every = np.arange(len(kept))
        return np.array([self.value(np.where(every == group, fraction, kept)) for fraction in fractions])

    def exact(self, gone: Any) -> float:
        raise AssertionError("not asked for")


@pytest.mark.parametrize("seed", range(8))
def test_near_the_best_of_all_widths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [6, 8, 7]
    scores = [np.cumsum(rng.uniform(0.05, 1, n)) for n in sizes]
    cost = _Product(sizes)
    limit = Limit("macs", cost, 0.5 * cost.full)
    keep = Widths(scores, [1, 1, 1], sizes, [np.arange(1, n + 1) for n in sizes]).choose([limit])

    def lost(widths: tuple[int, ...]) -> float:
        return sum(float(s[: len(s) - k].sum()) for s, k in zip(scores, widths, strict=True))

    every = itertools.product(*(range(1, n + 1) for n in sizes))
    fitting = [w for w in every if cost.value(np.array(w) / sizes) <= limit.most]
    best = min(map(lost, fitting))
    assert tuple(keep) in fitting
    assert lost(tuple(keep)) <= 1.2 * best + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_score_is_given_up_to_meet_a_limit_only_where_no_finer_widths_are_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [12, 16, 12]
    scores = [np.cumsum(rng.uniform(0.05, 1, n)) for n in sizes]
    cost = _Product(sizes)
    limit = Limit("macs", cost, rng.uniform(0.5, 0.8) * cost.full)
    allowed = [np.array([*range(4, n, 4), n]) for n in sizes]
    found = {last: Widths(scores, [4] * 3, sizes, allowed, last).choose([limit]) for last in (False, True)}

    def kept(widths: Any) -> float:
        return sum(float(s[len(s) - k :].sum()) for s, k in zip(scores, widths, strict=True))

    fitting = [w for w in itertools.product(*allowed) if cost.value(np.array(w) / sizes) <= limit.most]
    used = {last: cost.value(widths / sizes) / limit.most for last, widths in found.items()}
    assert kept(found[False]) >= 0.95 * max(map(kept, fitting))
    assert kept(found[False]) >= kept(found[True]) - 1e-9
    assert used[True] >= used[False] - 1e-9 and max(used.values()) <= 1 + 1e-9
    if used[True] < 0.99:  # no widths meet it
        assert all(cost.value(np.array(w) / sizes) / limit.most < 0.995 for w in fitting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "budget": Budget(macs=0.5)}, "ratio and budget exclude each other"),
        ({"budget": 0.5}, "budget: expected a graphprune.Budget"),
        ({"budget": Budget(macs=0.5), "max_ratio": 0.05}, "macs cannot be brought to"),
        ({"budget": Budget(macs=1e-6)}, "macs cannot be brought to"),
        ({"max_ratio": 0}, "max_ratio"),
        ({"max_ratio": 1.5}, "max_ratio"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        graphprune.plan(Mixed().eval(), X, **options)


@pytest.mark.parametrize("limits", [{}, {"macs": 0}, {"macs": -1}, {"params": "half"}, {"macs": True}])
def test_budgets_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(GraphPruneError, match="budget"):
        Budget(**limits)
