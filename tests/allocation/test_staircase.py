"""Widths on stairs: within the limits, and near the best that trying everything finds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from graphprune import GraphPruneError
from graphprune.allocation import Limit
from graphprune.allocation.staircase import StairWidths


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

    def exact(self, gone: Any) -> float:
        raise NotImplementedError

    def slopes(self, kept: Any) -> Any:
        raise NotImplementedError


def loss(scores: list[Any], keep: Any) -> float:
    return sum(float(np.sort(s)[: len(s) - k].sum()) for s, k in zip(scores, keep, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_near_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(4, 13, 4)]
    scores = [rng.gamma(1.0, 1.0, n) for n in sizes]
    cost = Chain(sizes, int(rng.integers(1, 5)), seed)
    limit = Limit("time", cost, float(rng.uniform(0.35, 0.85)) * cost.full, cost.curve)
    found = StairWidths(scores, [1] * 4, sizes, 1).choose([limit])
    assert cost.value(found / np.array(sizes)) <= limit.most * (1 + 1e-9)
    choices = list(itertools.product(*(range(1, n + 1) for n in sizes)))
    fitting = [k for k in choices if cost.value(np.array(k) / np.array(sizes)) <= limit.most]
    best = min(loss(scores, k) for k in fitting)
    assert loss(scores, found) <= best * 1.12 + 1e-9


def test_every_chosen_width_is_worth_its_place() -> None:
    """No wider width costs the same."""
    rng = np.random.default_rng(0)
    sizes = [64, 48, 96]
    cost = Chain(sizes, 16, 0)
    found = StairWidths([rng.uniform(size=n) for n in sizes], [1] * 3, sizes, 1).choose(
        [Limit("time", cost, 0.5 * cost.full, cost.curve)]
    )
    assert (found % 16 == 0).all()


@pytest.mark.parametrize("step", [1, 4])
def test_floors_ceilings_and_steps_hold(step: int) -> None:
    rng = np.random.default_rng(0)
    sizes, floors, ceilings = [32, 32, 32], [8, 4, 32], [32, 16, 32]
    cost = Chain(sizes, 3, 0)
    scores = [rng.uniform(size=n) for n in sizes]
    found = StairWidths(scores, floors, ceilings, step).choose([Limit("time", cost, 0.45 * cost.full, cost.curve)])
    assert (found >= floors).all() and (found <= ceilings).all() and (found % step == 0).all()


def test_two_limits_are_both_kept() -> None:
    rng = np.random.default_rng(0)
    sizes = [24, 32, 16]
    a, b = Chain(sizes, 4, 0), Chain(sizes, 1, 5)
    limits = [Limit("a", a, 0.6 * a.full, a.curve), Limit("b", b, 0.4 * b.full)]
    found = StairWidths([rng.uniform(size=n) for n in sizes], [1] * 3, sizes, 1).choose(limits)
    kept = found / np.array(sizes)
    assert a.value(kept) <= limits[0].most and b.value(kept) <= limits[1].most
    assert max(a.value(kept) / limits[0].most, b.value(kept) / limits[1].most) > 0.9


def test_nothing_goes_where_all_fits() -> None:
    cost = Chain([8, 8], 2, 0)
    found = StairWidths([np.ones(8)] * 2, [1, 1], [8, 8], 1).choose([Limit("time", cost, cost.full, cost.curve)])
    assert found.tolist() == [8, 8]


def test_what_cannot_be_reached_is_an_error() -> None:
    cost = Chain([8, 8], 2, 0)
    with pytest.raises(GraphPruneError, match=r"time cannot be brought to .* raise the budget"):
        StairWidths([np.ones(8)] * 2, [6, 6], [8, 8], 1).choose([Limit("time", cost, 0.1 * cost.full, cost.curve)])
