"""Widths of round_to="auto": the grid, the two widths around what is asked, and the share met on average."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.planning.allocation.rounding import _LITTLE, AUTO, FINE, NEAR, Item, around, on_average, widths


def allowed(width: int, size: int, grid: str) -> bool:
    """By the sentence in the documentation."""
    if width == size:
        return True
    if width >= 32:
        return width % 16 == 0
    if grid == FINE:
        return width < 16 or width % 4 == 0
    if width >= 16:
        return width % 8 == 0
    return width < 4 or width % 4 == 0


@pytest.mark.parametrize("grid", [AUTO, FINE])
def test_the_widths_are_those_that_the_documentation_lists(grid: str) -> None:
    for size in range(1, 200):
        assert widths(size, grid).tolist() == [k for k in range(1, size + 1) if allowed(k, size, grid)]
        assert widths(size, grid, whole=True).tolist() == list(range(1, size + 1))
    assert {8, 4}.issubset(widths(16, AUTO).tolist()) and 4 in widths(8, AUTO)


@given(size=st.integers(1, 100), step=st.integers(1, 20))
def test_multiples_of_a_number(size: int, step: int) -> None:
    assert widths(size, step).tolist() == sorted({*range(step, size + 1, step), size})


@given(
    asked=st.floats(0, 64), possible=st.sets(st.integers(1, 64), min_size=1, max_size=9), least=st.integers(1, 64)
)
def test_the_widths_around_what_is_asked(asked: float, possible: set[int], least: int) -> None:
    low, high = around(asked, np.array(sorted(possible)), least)
    left = [k for k in possible if k >= min(least, max(possible))]
    exact = [k for k in left if abs(k - asked) <= 1e-9]
    if exact:
        assert (low, high) == (exact[0], exact[0])
        return
    assert high == min((k for k in left if k > asked), default=max(left))
    assert low == max((k for k in left if k < asked), default=min(left))


SHARES = st.tuples(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 3))


@settings(max_examples=300)
@given(st.lists(SHARES, min_size=1, max_size=8))
def test_what_is_asked_is_met_within_half_a_step(given_items: list[Any]) -> None:
    items = [Item(asked, max(0.0, asked - less), asked + more, loss) for asked, less, more, loss in given_items]
    down, off = on_average(items)
    gone = sum(item.more if d else item.less for item, d in zip(items, down, strict=True))
    asked = sum(item.asked for item in items)
    assert off == pytest.approx(abs(gone - asked), abs=1e-9)
    steps = [item.more - item.less for item in items]
    small = sum(step for step in steps if step < _LITTLE * asked)  # rounded to nearest, each by itself
    assert off <= max(steps) / 2 + small / 2 + 1e-9
    best = min(
        abs(sum(item.more if d else item.less for item, d in zip(items, choice, strict=True)) - asked)
        for choice in itertools.product([False, True], repeat=len(items))
    )
    assert off >= best - 1e-9


def test_the_least_important_are_rounded_down() -> None:
    items = [Item(0.3, 0.25, 0.5, loss) for loss in (5.0, 1.0, 3.0, 2.0, 4.0)]
    assert on_average(items)[0] == [False, True, False, False, False]  # one of five: 0.3 on average
    alike = [Item(0.3, 0.25, 0.5, 1.0), Item(0.45, 0.25, 0.5, 1.0), Item(0.25, 0.25, 0.5, 1.0)]
    assert on_average(alike)[0] == [False, True, False]


def sequence(*sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    pairs = itertools.pairwise([3, *sizes])
    layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], 2, 3)).eval(), torch.randn(1, 3, 4, 4)


def around_pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([3, *sizes, 2]))


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(4, 90), min_size=2, max_size=6), ratio=st.floats(0.05, 0.9), data=st.data())
def test_plans_get_what_they_ask_on_average(sizes: list[int], ratio: float, data: Any) -> None:
    net, x = sequence(*sizes)
    criterion = data.draw(st.sampled_from(["flow", "l1", "random"]))
    plan = graphprune.plan(net, x, ratio, criterion=criterion)
    kept = [g.kept for g in plan.groups]
    # each group has a part in the layer that makes it and in the one that reads it; the last has 2 x 2 places
    layers = [places * a * b for places, (a, b) in zip([16] * len(sizes) + [4], around_pairs(sizes), strict=True)]
    weights = np.array([a + b for a, b in itertools.pairwise(layers)], float)
    weights /= weights.sum()
    assert [g.weight for g in plan.groups] == pytest.approx(list(weights * len(sizes)))
    assert plan.asked == pytest.approx(ratio)
    gone = np.array([1 - k / n for k, n in zip(kept, sizes, strict=True)])
    assert plan.gone == pytest.approx(float(weights @ gone))
    grid = AUTO if all(allowed(k, n, AUTO) for k, n in zip(kept, sizes, strict=True)) else FINE
    for k, n in zip(kept, sizes, strict=True):
        assert allowed(k, n, grid) and k in around((1 - ratio) * n, widths(n, grid), 1)
    # as near as half of the largest step; finer widths only where the others are too coarse
    steps = weights * [np.subtract(*around((1 - ratio) * n, widths(n, grid), 1)[::-1]) / n for n in sizes]
    assert abs(plan.gone - plan.asked) <= max(steps) / 2 + 1e-9 or plan.gone < plan.asked
    if grid == AUTO:
        assert abs(plan.gone - plan.asked) <= max(NEAR, max(steps) / 2) + 1e-9 or plan.gone < plan.asked
    assert f"removed {plan.gone:.1%}" in str(plan)


def test_floors_hold() -> None:
    net, x = sequence(64, 64)
    for options, least in (({"max_ratio": 0.3}, 45), ({"min_channels": 40}, 40)):
        kept = [g.kept for g in graphprune.plan(net, x, 0.8, **options).groups]
        assert all(k >= least and k % 16 == 0 for k in kept)


def test_equal_layers_of_a_transformer_stay_equal() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 100, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 32)
    plan = graphprune.plan(net, x, 0.3, granularity="mlp")
    assert len({g.kept for g in plan.groups if g.kind == "mlp channel"}) == 1
    assert {g.kept for g in plan.groups if g.kind == "mlp channel"} <= {64, 80}


def test_whole_heads_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(72, 6, 64, batch_first=True).eval()
    plan = graphprune.plan(net, torch.randn(2, 5, 72), 0.3, granularity="heads")
    assert [g.kept for g in plan.groups if g.kind == "head"] == [4]  # 4.2 of 6


def test_a_file_keeps_what_was_asked(tmp_path: Any) -> None:
    net, x = sequence(32, 48)
    plan = graphprune.plan(net, x, 0.3)
    again = graphprune.Plan.load(plan.save(tmp_path / "plan.json"))
    assert again.asked == plan.asked and again.gone == plan.gone and again == plan
    budget = graphprune.plan(net, x, budget=graphprune.Budget(macs=0.5))
    assert budget.asked is None and budget.gone is None and "asked to remove" not in str(budget)


@pytest.mark.parametrize("wrong", ["automatic", 0, -4, 2.0, True, None])
def test_other_values_are_errors(wrong: Any) -> None:
    net, x = sequence(8)
    with pytest.raises(GraphPruneError, match=r'round_to: expected "auto" or an integer of at least 1, got'):
        graphprune.plan(net, x, 0.5, round_to=wrong)
