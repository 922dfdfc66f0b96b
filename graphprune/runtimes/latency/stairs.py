"""Stairs: the widths that are worth having on one machine.

The time of a layer is no line over its width. Vector registers and tiles are filled up to their length, so that many
widths cost the same, and some cost more than a larger one. A width is a *step* if no larger one is as fast.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import GraphPruneError
from ...support.progress import stage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Widths are scanned over two periods and a little more.
PERIOD, _TAIL = 64, 16
_PERIODS = (1, 2, 4, 8, 16, 32, 64)
# How much cheaper a step is than the next one, against noise; how much dearer than a larger one no step is; how much
# worse a simpler pattern may fit.
_TOLERANCE, _DEAR, _SIMPLER = 0.012, 0.05, 1.2
_SCANS = 5


def scan_widths() -> Ints:
    """The widths at which stairs are looked for."""
    return np.arange(PERIOD + 1, 3 * PERIOD + _TAIL + 1, dtype=np.int64)


def cheapest_above(seconds: Floats) -> Floats:
    """The least time of each width and all larger ones."""
    return np.minimum.accumulate(seconds[::-1])[::-1]


def period_of(numbers: Floats) -> int:
    """The shortest period (one of `_PERIODS`) after which numbers, one for each of `scan_widths()`, repeat but for
    a smooth trend.

    A longer one must say more about numbers that are left out of it, so that noise has no period.
    """
    errors = [_left_out(numbers - trend_of(numbers, p)[0], p) for p in _PERIODS]
    good = _SIMPLER * min(errors) + 1e-9 * float(np.abs(numbers).max())
    return next(p for p, e in zip(_PERIODS, errors, strict=True) if e <= good)


def trend_of(numbers: Floats, period: int) -> tuple[Floats, float]:
    """The least squares parabola over the width, zero and with the returned slope in the middle, where each remainder
    modulo `period` has a level of its own."""
    away = scan_widths() - scan_widths().mean()
    basis = np.stack([away, away**2], 1)
    at = scan_widths() % period
    inside = [np.concatenate([v[at == r] - v[at == r].mean(0) for r in range(period)]) for v in (basis, numbers)]
    slope, bend = np.linalg.lstsq(inside[0], inside[1], rcond=None)[0].tolist()
    return slope * away + bend * away**2, slope


def _left_out(numbers: Floats, period: int) -> float:
    """Mean distance of each number from the median of the others a multiple of `period` away."""
    at = scan_widths() % period
    total = 0.0
    for r in range(period):
        own = numbers[at == r]
        total += sum(abs(own[i] - np.median(np.delete(own, i))) for i in range(len(own)))
    return float(total) / len(numbers)


def _medians(values: Floats, period: int) -> Floats:
    """One number per remainder modulo `PERIOD`: the median of what lies a multiple of `period` away."""
    at = scan_widths() % period
    return np.tile([np.median(values[at == r]) for r in range(period)], PERIOD // period)


@dataclasses.dataclass(frozen=True)
class Stairs:
    """Widths worth having, by their remainder modulo `PERIOD`; `penalty[r]`: time of a width with remainder r over the
    time of the next step above it."""

    steps: tuple[int, ...]
    penalty: tuple[float, ...]

    def __post_init__(self) -> None:
        good = self.steps and all(type(s) is int and 0 <= s < PERIOD for s in self.steps)
        if not good or len(self.penalty) != PERIOD or not all(0.2 < p < 10 for p in self.penalty):
            raise GraphPruneError(f"latency table: stairs must be remainders modulo {PERIOD} and as many factors")

    @classmethod
    def found(cls, seconds: Sequence[float]) -> Stairs:
        """From the times at `scan_widths()`. What departs from a line in no regular way is noise; where nothing does,
        every width is a step."""
        times, widths = np.asarray(seconds, np.float64), scan_widths()
        least = cheapest_above(times)
        cheap = times <= least * (1 + _DEAR)  # no larger one costs clearly less
        regular = period_of(cheap.astype(np.float64))
        period = max(period_of(least), regular)
        trend, growth = trend_of(least, period)
        if period == 1 and growth > 0:
            return SMOOTH
        off = np.where(_medians(cheap.astype(np.float64), period) > 0.5, _medians(times - trend, period), np.inf)
        steps = _steps(off / float(np.median(least)), max(0.0, growth) / float(np.median(least)))
        made = cls(steps, (1.0,) * PERIOD)
        above = np.minimum(made.up(widths) - widths[0], len(times) - 1)
        regular = max(regular, next(p for p in _PERIODS if {(s + p) % PERIOD for s in steps} == set(steps)))
        penalty = np.clip(_medians(times / times[above], regular), 0.5, 5)
        penalty[list(steps)] = 1
        return cls(steps, tuple(float(p) for p in penalty))

    @property
    def step(self) -> int:
        """The least number that divides `PERIOD` and whose multiples are all steps."""
        divisors = [d for d in range(1, PERIOD + 1) if PERIOD % d == 0]
        return next((d for d in divisors if set(range(0, PERIOD, d)) <= set(self.steps)), 1)

    def up(self, widths: npt.ArrayLike) -> Ints:
        """The next step at or above each width."""
        w = np.asarray(widths, np.int64)
        up: Ints = w + self._distance[w % PERIOD]
        return up

    def factor(self, widths: npt.ArrayLike) -> Floats:
        """Time at each width over the time at `up` of it."""
        return self._penalty[np.asarray(widths, np.int64) % PERIOD]

    @functools.cached_property
    def _distance(self) -> Ints:
        steps = np.array([*self.steps, self.steps[0] + PERIOD], np.int64)
        remainders = np.arange(PERIOD)
        return steps[np.searchsorted(steps, remainders)] - remainders

    @functools.cached_property
    def _penalty(self) -> Floats:
        return np.asarray(self.penalty, np.float64)


def _steps(level: Floats, growth: float) -> tuple[int, ...]:
    """Remainders of the widths that are cheaper than the next step: `level` by remainder, about 1, infinite where it is
    out of the question; `growth` by a width."""
    rising = np.tile(level, 4) + growth * (np.arange(4 * PERIOD) - 2 * PERIOD)
    # the first: the width that all larger ones exceed by most
    possible = [w for w in range(2 * PERIOD, 3 * PERIOD) if np.isfinite(rising[w])]
    above = max(possible, key=lambda w: float(rising[w + 1 : w + PERIOD + 1].min() / rising[w]))
    found = {above % PERIOD}
    for w in range(above - 1, above - PERIOD, -1):
        if rising[w] < rising[above] - _TOLERANCE:
            found.add(w % PERIOD)
            above = w
    return tuple(sorted(found))


SMOOTH = Stairs(tuple(range(PERIOD)), (1.0,) * PERIOD)
# Seconds of two computations in a row with a width between them, for each of these widths.
ChainMeter = Callable[[str, Sequence[int]], list[float]]


def scan(meter: ChainMeter, kind: str) -> Stairs:
    """The stairs of a kind of computation: widths are timed again, each at the lowest that was seen of it, until the
    same steps are found twice in a row, so that one scan of a busy machine does not settle it."""
    widths = scan_widths().tolist()
    with stage(f"widths of {kind}", _SCANS, "scans at most", still=True) as now:
        lowest = np.asarray(meter(kind, widths), np.float64)
        found = Stairs.found(lowest.tolist())
        for _ in range(_SCANS - 1):
            now.advance()
            before, lowest = found, np.minimum(lowest, meter(kind, widths))
            found = Stairs.found(lowest.tolist())
            if found.steps == before.steps:
                break
    return found
