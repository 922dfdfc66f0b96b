from __future__ import annotations

import statistics

import numpy as np
import pytest

from graphprune.runtimes.results import row_of
from graphprune.runtimes.statistics import calls_per_sample, schedule, speedup_interval, spread


def test_schedule() -> None:
    rounds = schedule(4, 50, seed=3)
    assert len(rounds) == 50
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 10
    assert rounds == schedule(4, 50, seed=3) != schedule(4, 50, seed=4)
    # Every model comes first about as often as any other.
    first = [order[0] for order in schedule(3, 3000, seed=0)]
    assert all(abs(first.count(i) - 1000) < 120 for i in range(3))


def slow_percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def test_spread_against_a_slow_reference() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 31):
        values = [float(v) for v in generator.lognormal(size=size)]
        expected = [slow_percentile(values, p) for p in (50, 10, 90)]
        assert spread(values) == pytest.approx(expected, rel=1e-12)
        assert spread(values)[0] == pytest.approx(statistics.median(values), rel=1e-12)


def slow_interval(baseline: list[float], other: list[float], resamples: int, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    rounds = len(baseline)
    drawn = generator.integers(0, rounds, size=(resamples, rounds))
    ratios = []
    for row in drawn:
        ratios.append(statistics.median(baseline[i] for i in row) / statistics.median(other[i] for i in row))
    return slow_percentile(ratios, 2.5), slow_percentile(ratios, 97.5)


def test_interval_against_a_slow_reference() -> None:
    generator = np.random.default_rng(1)
    for rounds in (2, 7, 30):
        baseline = [float(v) for v in generator.lognormal(size=rounds)]
        other = [float(v) for v in generator.lognormal(size=rounds)]
        ratio, low, high = speedup_interval(baseline, other, resamples=300, seed=5)
        assert ratio == pytest.approx(statistics.median(baseline) / statistics.median(other))
        assert (low, high) == pytest.approx(slow_interval(baseline, other, 300, 5), rel=1e-9)
        assert low <= high


def test_interval_is_paired_by_round() -> None:
    """A machine that slows down for some rounds changes both alike: the ratio is exact all the same."""
    drift = np.random.default_rng(2).lognormal(sigma=1.0, size=25)
    ratio, low, high = speedup_interval(3 * drift, drift)
    assert (ratio, low, high) == pytest.approx((3, 3, 3))


def test_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        baseline = 2.0 + generator.normal(scale=0.2, size=30)
        other = 1.0 + generator.normal(scale=0.1, size=30)
        _, low, high = speedup_interval(baseline, other, resamples=400, seed=seed)
        covered += low <= 2.0 <= high
    assert covered >= 88


def test_many_rounds_are_resampled_in_parts() -> None:
    values = np.random.default_rng(4).lognormal(size=50_000)
    ratio, low, high = speedup_interval(values, values / 2, resamples=90)
    assert (ratio, low, high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(("seconds", "least", "calls"), [
    ([0.02, 0.5, 0.02], 0.1, 5), ([0.03, 0.03, 0.03], 0.1, 4), ([0.2, 0.3, 0.4], 0.1, 1), ([0.0, 0.0, 0.0], 0.0, 1),
])  # fmt: skip
def test_a_sample_has_as_many_calls_as_take_its_time(seconds: list[float], least: float, calls: int) -> None:
    left = iter(seconds)
    assert calls_per_sample(lambda: next(left), least) == calls
    assert not list(left)


@pytest.mark.parametrize(("clock", "median"), [("wall", 3000.0), ("cpu", 3000.0), ("wall, fastest", 1000.0)])
def test_a_row_of_samples(clock: str, median: float) -> None:
    samples, baseline = [5.0, 1.0, 3.0], [10.0, 2.0, 6.0]
    found = row_of(
        samples, baseline, seed=0, clock=clock, model="a", batch_size=None, calls=2, nodes={}, parameters=None,
        file_mib=1.0, max_relative_error=None,
    )  # fmt: skip
    assert found.samples_ms == (5000.0, 1000.0, 3000.0) and found.median_ms == median and found.clock == clock
    assert found.speedup == found.speedup_low == found.speedup_high == 2
    assert found.p10_ms == pytest.approx(1400) and found.p90_ms == pytest.approx(4600)
