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

from ..errors import GraphPruneError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Widths are scanned over two periods and a little more, so that the last of them have larger ones beside them.
PERIOD, _TAIL = 64, 16
# How much faster a width must be than every larger one, against noise.
_TOLERANCE = 0.02


def scan_widths() -> Ints:
    """The widths at which stairs are looked for."""
    return np.arange(PERIOD + 1, 3 * PERIOD + _TAIL + 1, dtype=np.int64)


def undominated(seconds: Floats, tolerance: float) -> npt.NDArray[np.bool_]:
    """Which entries are lower, by this share, than all entries after them."""
    rest = np.minimum.accumulate(np.append(seconds[1:], np.inf)[::-1])[::-1]
    found: npt.NDArray[np.bool_] = seconds < rest * (1 - tolerance)
    return found


@dataclasses.dataclass(frozen=True)
class Stairs:
    """Widths worth having, by their remainder modulo `PERIOD`; `penalty[r]`: time of a width with remainder r over the
    time of the next step above it."""

    steps: tuple[int, ...]
    penalty: tuple[float, ...]

    def __post_init__(self) -> None:
        good = self.steps and all(0 <= s < PERIOD for s in self.steps) and len(self.penalty) == PERIOD
        if not good or not all(0.2 < p < 10 for p in self.penalty):
            raise GraphPruneError(f"latency table: stairs must be remainders modulo {PERIOD} and as many factors")

    @classmethod
    def found(cls, seconds: Sequence[float]) -> Stairs:
        """From the times at `scan_widths()`: steps are remainders that are undominated in both periods."""
        times = np.asarray(seconds, np.float64)
        good = undominated(times, _TOLERANCE)[: 2 * PERIOD].reshape(2, PERIOD).all(0)
        remainders = scan_widths()[:PERIOD] % PERIOD
        steps = sorted(int(r) for r in remainders[good]) or [0]
        made = cls(tuple(steps), (1.0,) * PERIOD)
        first = times[: 2 * PERIOD].reshape(2, PERIOD)
        above = made.up(scan_widths()[: 2 * PERIOD]) - (PERIOD + 1)
        ratios = (first.reshape(-1) / times[np.minimum(above, len(times) - 1)]).reshape(2, PERIOD).mean(0)
        penalty = np.ones(PERIOD)
        penalty[remainders] = np.clip(ratios, 0.5, 5)
        penalty[steps] = 1
        return cls(tuple(steps), tuple(float(p) for p in penalty))

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


SMOOTH = Stairs(tuple(range(PERIOD)), (1.0,) * PERIOD)
# Seconds of two computations in a row with a width between them, for each of these widths.
ChainMeter = Callable[[str, Sequence[int]], list[float]]
