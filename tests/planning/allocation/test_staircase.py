"""Widths on stairs: within the limits, and near the best that trying everything finds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from graphprune import GraphPruneError
from graphprune.planning.allocation import Limit
from graphprune.planning.allocation.budget import Widths
from graphprune.planning.allocation.exchange import Choice, Ground
from graphprune.planning.allocation.rounding import widths
from graphprune.planning.allocation.staircase import StairWidths


def every(sizes: list[int], step: int = 1) -> list[Any]:
    """All multiples of the step."""
    return [widths(n, step) for n in sizes]


class Chain:
    """Layers one after the other: layer i costs ceil(w[i] / step) * ceil(w[i + 1] / step), and its own factor."""

    def __init__(self, sizes: list[int], step: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sizes, self.step = np.array(sizes), step
        self.factors = rng.uniform(0.5, 2, len(sizes) + 1)

    def value(self, kept: Any) -> float:
        blocks = np.ceil(np.rint(np.asarray(kept) * self.sizes) / self.step)
        padded = np.concatenate([[2], blocks, [2]])
        return float((self.factors * padded[:-1] * padded[1:]).sum())

    @property
    def full(self) -> float:
        return self.value(np.ones(len(self.sizes)))

    def curve(self, group: int, kept: Any, fractions: Any) -> Any:
        out = []
        for f in fractions:
            other = np.array(kept, float)
            other[group] = f
            out.append(self.value(other))
        return np.array(out)

    def partners(self, group: int) -> set[int]:
        return set(range(len(self.sizes))) - {group}

    def exact(self, gone: Any) -> float:
        raise NotImplementedError

    def slopes(self, kept: Any) -> Any:
        """What the last tenth of each group costs."""
        out = []
        for g, k in enumerate(kept):
            low, high = self.curve(g, kept, [max(0.0, k - 0.1), k])
            out.append((high - low) / max(min(k, 0.1), 1e-9))
        return np.array(out)


class Star(Chain):
    """Group 0 beside each of the others: all others together cost as much with it as it costs alone."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes)

    def value(self, kept: Any) -> float:
        w = np.rint(np.asarray(kept) * self.sizes)
        return float(6 * len(w) * w[0] + (w[0] * w[1:]).sum())


def loss(scores: list[Any], keep: Any) -> float:
    return sum(float(np.sort(s)[: len(s) - k].sum()) for s, k in zip(scores, keep, strict=True))


def between(cost: Chain, share: float) -> float:
    """A limit between what one unit per group costs and what all cost."""
    least = cost.value(1 / cost.sizes)
    return least + share * (cost.full - least)


def _instance(seed: int) -> tuple[list[int], list[Any], Limit]:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(4, 13, 4)]
    scores = [rng.gamma(1.0, 1.0, n) for n in sizes]
    cost = Chain(sizes, int(rng.integers(1, 5)), seed)
    return sizes, scores, Limit("time", cost, between(cost, float(rng.uniform(0.2, 0.8))), cost.curve)


def test_near_the_best_of_all_choices() -> None:
    over = []
    for seed in range(30):
        sizes, scores, limit = _instance(seed)
        found = StairWidths(scores, [1] * 4, sizes, every(sizes)).choose([limit])
        assert limit.cost.value(found / np.array(sizes)) <= limit.most * (1 + 1e-9)
        choices = itertools.product(*(range(1, n + 1) for n in sizes))
        fitting = [k for k in choices if limit.cost.value(np.array(k) / np.array(sizes)) <= limit.most]
        best = min(loss(scores, k) for k in fitting)
        over.append(loss(scores, found) / best - 1)
    assert np.median(over) < 1e-9 and np.max(over) <= 0.04


def test_never_less_of_the_score_than_the_chooser_for_costs_without_stairs() -> None:
    strictly = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        sizes = [int(n) for n in rng.integers(8, 65, int(rng.integers(2, 9)))]
        scores = [rng.gamma(float(rng.uniform(0.3, 3)), 1.0, n) for n in sizes]
        cost = Chain(sizes, int(rng.integers(1, 17)), seed)
        limit = Limit("time", cost, between(cost, float(rng.uniform(0.2, 0.8))), cost.curve)
        floors = [1] * len(sizes)
        plain = loss(scores, Widths(scores, floors, sizes, every(sizes)).choose([limit]))
        found = loss(scores, StairWidths(scores, floors, sizes, every(sizes)).choose([limit]))
        assert found <= plain * (1 + 1e-9)
        strictly += found < plain * (1 - 1e-3)
    assert strictly > 12


def test_equal_groups_do_not_hold_each_other() -> None:
    """One wide group beside all others: giving it up costs little, giving up all others costs nothing, but none of them
    alone helps enough."""
    sizes = [64] + [6] * 10
    scores = [np.full(64, 1.0)] + [np.linspace(0.1, 0.2, 6)] * 10
    cost = Star(sizes)
    limit = Limit("time", cost, 0.7 * cost.full, cost.curve)
    found = StairWidths(scores, [1] * 11, sizes, every(sizes)).choose([limit])
    likely = {(k, *([m] * 10)) for k in range(1, 65) for m in range(1, 7)}
    fitting = [k for k in likely if cost.value(np.array(k) / np.array(sizes)) <= limit.most]
    assert loss(scores, found) <= min(loss(scores, k) for k in fitting) + 1e-9


def test_a_choice_knows_what_it_uses_and_loses() -> None:
    """Steps taken one at a time, against values from scratch."""
    rng = np.random.default_rng(0)
    sizes, scores, limit = _instance(3)
    options = [np.arange(1, n + 1) for n in sizes]
    lost = [np.array([loss([s], [k]) for k in o]) for s, o in zip(scores, options, strict=True)]
    limits = [limit, Limit("other", Chain(sizes, 1, 9), 50.0)]
    ground = Ground(options, lost, np.array(sizes), limits, [limit.most, 50.0])
    choice = Choice(ground, ground.last)
    for _ in range(60):
        group = int(rng.integers(len(sizes)))
        option = int(rng.integers(sizes[group]))
        cost, more = choice.changes()
        before, lost_before = choice.used.copy(), choice.loss
        choice = choice.copy()
        choice.move(group, option)
        fresh = Choice(ground, choice.at)
        assert choice.used == pytest.approx(fresh.used) and choice.loss == pytest.approx(fresh.loss)
        assert choice.used == pytest.approx(before + cost[group, :, option])
        assert choice.loss == pytest.approx(lost_before + more[group, option])
        assert choice.curves == pytest.approx(fresh.curves)
        assert choice.widths().tolist() == [o[i] for o, i in zip(options, choice.at, strict=True)]


def test_every_chosen_width_is_worth_its_place() -> None:
    """No wider width costs the same."""
    rng = np.random.default_rng(0)
    sizes = [64, 48, 96]
    cost = Chain(sizes, 16, 0)
    found = StairWidths([rng.uniform(size=n) for n in sizes], [1] * 3, sizes, every(sizes)).choose(
        [Limit("time", cost, 0.5 * cost.full, cost.curve)]
    )
    assert (found % 16 == 0).all()


@pytest.mark.parametrize("step", [1, 4])
def test_floors_ceilings_and_steps_hold(step: int) -> None:
    rng = np.random.default_rng(0)
    sizes, floors, ceilings = [32, 32, 32], [8, 4, 32], [32, 16, 32]
    cost = Chain(sizes, 3, 0)
    scores = [rng.uniform(size=n) for n in sizes]
    chooser = StairWidths(scores, floors, ceilings, every(sizes, step))
    found = chooser.choose([Limit("time", cost, 0.45 * cost.full, cost.curve)])
    assert (found >= floors).all() and (found <= ceilings).all() and (found % step == 0).all()


def test_two_limits_are_both_kept() -> None:
    rng = np.random.default_rng(0)
    sizes = [24, 32, 16]
    a, b = Chain(sizes, 4, 0), Chain(sizes, 1, 5)
    limits = [Limit("a", a, 0.6 * a.full, a.curve), Limit("b", b, 0.4 * b.full)]
    found = StairWidths([rng.uniform(size=n) for n in sizes], [1] * 3, sizes, every(sizes)).choose(limits)
    kept = found / np.array(sizes)
    assert a.value(kept) <= limits[0].most and b.value(kept) <= limits[1].most
    assert max(a.value(kept) / limits[0].most, b.value(kept) / limits[1].most) > 0.9


def test_nothing_goes_where_all_fits() -> None:
    cost = Chain([8, 8], 2, 0)
    chooser = StairWidths([np.ones(8)] * 2, [1, 1], [8, 8], every([8, 8]))
    found = chooser.choose([Limit("time", cost, cost.full, cost.curve)])
    assert found.tolist() == [8, 8]


def test_what_cannot_be_reached_is_an_error() -> None:
    cost = Chain([8, 8], 2, 0)
    chooser = StairWidths([np.ones(8)] * 2, [6, 6], [8, 8], every([8, 8]))
    with pytest.raises(GraphPruneError, match=r"time cannot be brought to .* raise the budget"):
        chooser.choose([Limit("time", cost, 0.1 * cost.full, cost.curve)])
