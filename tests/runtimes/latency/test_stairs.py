"""Stairs are found where they are, and noise does not make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from graphprune import GraphPruneError
from graphprune.runtimes.latency.stairs import PERIOD, SMOOTH, Stairs, cheapest_above, period_of, scan, scan_widths


def times(step: int, noise: float = 0.0) -> list[float]:
    widths = scan_widths()
    steady = np.ceil(widths / step) * step + 4.0
    return [float(t) for t in steady * (1 + noise * np.random.default_rng(0).uniform(-1, 1, len(widths)))]


@pytest.mark.parametrize("step", [8, 16, 32, 64])
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_steps_are_found(step: int, noise: float) -> None:
    assert Stairs.found(times(step, noise)).steps == tuple(range(0, PERIOD, step))


def test_a_width_dearer_than_a_larger_one_is_no_step_and_has_a_penalty() -> None:
    seconds = np.array(times(16))
    odd = scan_widths() % 2 == 1
    seconds[odd] *= 1.3
    stairs = Stairs.found(seconds.tolist())
    assert stairs.steps == (0, 16, 32, 48)
    factor = stairs.factor([16, 32, 17, 18, 81])
    assert factor == pytest.approx([1, 1, 1.3, 1, 1.3], rel=1e-3)


@pytest.mark.parametrize("steps", [(0, 16, 32, 48), (5,), (0,), (3, 40)])
def test_up_is_the_next_step(steps: tuple[int, ...]) -> None:
    stairs = Stairs(steps, (1.0,) * PERIOD)
    for width in range(1, 400):
        slow = next(w for w in range(width, width + PERIOD + 1) if w % PERIOD in steps)
        assert int(stairs.up(width)) == slow


@pytest.mark.parametrize(
    "steps, step", [((0, 16, 32, 48), 16), ((0,), 64), (tuple(range(64)), 1), ((0, 7, 32), 32), ((5,), 1)]
)
def test_the_step_is_the_least_whose_multiples_are_steps(steps: tuple[int, ...], step: int) -> None:
    assert Stairs(steps, (1.0,) * PERIOD).step == step


def test_cheapest_above_is_the_least_of_what_is_not_narrower() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        t = rng.uniform(1, 2, 12)
        assert cheapest_above(t).tolist() == [min(t[i:]) for i in range(12)]


@pytest.mark.parametrize("period", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_period_is_found_where_there_is_one(period: int, noise: float) -> None:
    rng = np.random.default_rng(period)
    ratios = 1 + 0.1 * (scan_widths() % period) / max(1, period - 1)
    assert period_of(ratios * (1 + noise * rng.uniform(-1, 1, len(ratios)))) == period


@pytest.mark.parametrize("seed", range(10))
def test_noise_on_a_line_makes_no_stairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = (scan_widths() + 20.0) * (1 + 0.03 * rng.uniform(-1, 1, len(scan_widths())))
    assert Stairs.found(seconds.tolist()) == SMOOTH


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("step, even", [(16, 4), (8, 4), (32, 8), (4, 4), (16, 16)])
def test_stairs_that_only_some_widths_follow(seed: int, step: int, even: int) -> None:
    """Blocks of `step` channels for multiples of `even`, something else, far dearer and with a slope of its own, for
    all other widths; slow spells of the machine."""
    rng = np.random.default_rng(seed)
    widths = scan_widths()
    seconds = np.where(widths % even == 0, np.ceil(widths / step) * step + 20.0, 1.5 * widths + 10)
    seconds = seconds * (1 + 0.01 * rng.uniform(-1, 1, len(widths)))
    seconds[40:45] *= 1.3
    stairs = Stairs.found(seconds.tolist())
    assert stairs.steps == tuple(range(0, PERIOD, step))
    assert (stairs.factor([1, 2, 3, 65]) > 1.1).all() == (even > 1)
    assert stairs.factor(np.arange(0, 256, even)) == pytest.approx(1, abs=0.02)


def test_smooth_has_every_width() -> None:
    assert SMOOTH.up(np.arange(1, 200)).tolist() == list(range(1, 200))


ONES = (1.0,) * 64


@pytest.mark.parametrize("steps, penalty", [((), ONES), ((64,), ONES), ((0,), (1.0,)), ((0,), (99.0,) * 64)])
def test_nonsense_is_refused(steps: tuple[int, ...], penalty: tuple[float, ...]) -> None:
    with pytest.raises(GraphPruneError, match="stairs"):
        Stairs(steps, penalty)


def test_a_scan_of_a_busy_machine_does_not_settle_the_steps() -> None:
    quiet, rng = np.asarray(times(16, 0.004)), np.random.default_rng(0)
    busy = quiet * (1.1 + 0.5 * rng.random(len(quiet)))
    scans = [busy, quiet, quiet * 1.02]
    asked: list[str] = []

    def meter(kind: str, widths: Sequence[int]) -> list[float]:
        assert list(widths) == scan_widths().tolist()
        asked.append(kind)
        found: list[float] = scans[len(asked) - 1].tolist()
        return found

    assert Stairs.found(busy.tolist()).steps != (0, 16, 32, 48)
    assert scan(meter, "conv").steps == (0, 16, 32, 48)
    assert asked == ["conv"] * 3
