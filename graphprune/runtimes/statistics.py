"""Order of measurements and what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def schedule(models: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round, all numbers below `models` in an order of its own, so that drift hits every model alike."""
    generator = np.random.default_rng(seed)
    return [[int(i) for i in generator.permutation(models)] for _ in range(rounds)]


def calls_per_sample(once: Callable[[], float], min_time: float) -> int:
    """How many calls in a row take `min_time` seconds, at least 1. `once`: the seconds of one call."""
    # The fastest of three: a hiccup here would make all samples of this model shorter than asked for.
    fastest = min(once() for _ in range(3))
    return max(1, math.ceil(min_time / max(fastest, 1e-7)))


def spread(samples: Sequence[float] | Floats) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile (linear interpolation between order statistics)."""
    median, p10, p90 = np.percentile(np.asarray(samples, dtype=np.float64), (50, 10, 90))
    return float(median), float(p10), float(p90)


def speedup_interval(
    baseline: Sequence[float] | Floats,
    other: Sequence[float] | Floats,
    *,
    fastest: bool = False,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Speed-up median(baseline) / median(other), and the ends of its percentile bootstrap interval. `fastest`: of the
    smallest samples instead of medians.

    Both sequences have one sample per round. Rounds are drawn with replacement and taken from both sequences
    together, so that what slows down a whole round cancels (Efron & Tibshirani, An Introduction to the Bootstrap,
    chapter 13).
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(other, dtype=np.float64)
    rounds = len(first)
    generator = np.random.default_rng(seed)
    typical = np.min if fastest else np.median
    ratios = []
    # In parts, so that the index table stays small for any number of rounds.
    part = max(1, min(resamples, 2_000_000 // rounds))
    for start in range(0, resamples, part):
        drawn = generator.integers(0, rounds, size=(min(part, resamples - start), rounds))
        ratios.append(typical(first[drawn], axis=1) / typical(second[drawn], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), (tail, 1 - tail))
    return float(typical(first) / typical(second)), float(low), float(high)
