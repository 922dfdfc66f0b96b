"""Widths under costs that are stairs: a multiple-choice knapsack over the steps of every group.

A price per cost turns the limit into a sum that is made as small as possible, group by group in turn (a layer's cost
depends on the groups on both of its sides), while the price rises; then what room is left is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .budget import Limit, check_least
from .costs import Floats

Ints = npt.NDArray[np.int64]
_PRICES, _SWEEPS, _BISECTIONS, _EXCHANGES = 40, 12, 14, 24
# A step is worth having if every larger width costs at least this much more.
_TOLERANCE = 0.002


class StairWidths:
    """Chooses how many units of each group stay; arguments as those of `Widths`."""

    def __init__(self, scores: Sequence[Floats], floors: Sequence[int], ceilings: Sequence[int], step: int) -> None:
        self.sizes = np.array([len(s) for s in scores], np.int64)
        self.ceilings = np.minimum(np.asarray(ceilings, np.int64), self.sizes)
        self.floors = np.minimum(np.asarray(floors, np.int64), self.ceilings)
        self.step = step
        # lost[g][k]: the score that goes when k units of group g stay
        self.lost = [
            np.concatenate([[0.0], np.cumsum(np.sort(np.asarray(s, np.float64)))])[::-1].copy() for s in scores
        ]
        self._options: list[Ints] | None = None

    def choose(self, limits: Sequence[Limit], scale: float = 1.0) -> Ints:
        """The widths for limits multiplied by `scale`.

        Raises GraphPruneError when even the floors cost more.
        """
        most = [limit.most * scale for limit in limits]
        options = self._steps(limits)
        least = np.array([o[0] for o in options], np.int64)
        check_least(self.fraction(least), limits, most, ",.4g")
        keep = self.ceilings.copy()
        if self._fits(keep, limits, most):
            return keep
        prices = self._prices(options, limits, most)
        fitting, before, low, high = least, keep, float(prices[0]), float(prices[-1])
        for price in prices:
            new = self._settled(keep, price, options, limits, most)
            if self._fits(new, limits, most):
                fitting, high = new, float(price)
                break
            before, keep, low = new, new, float(price)
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            new = self._settled(before, middle, options, limits, most)
            if self._fits(new, limits, most):
                if self._loss(new) <= self._loss(fitting):
                    fitting = new
                high = middle
            else:
                before, low = new, middle
        keep = self._filled(fitting, options, limits, most)
        return self._exchanged(keep, options, limits, most)

    def fraction(self, keep: Ints) -> Floats:
        return keep / np.maximum(self.sizes, 1)

    def _steps(self, limits: Sequence[Limit]) -> list[Ints]:
        """Per group, ascending: the widths that no larger one is as cheap as, the others kept whole."""
        if self._options is not None:
            return self._options
        whole = self.fraction(self.ceilings)
        out = []
        for g in range(len(self.sizes)):
            low, high = int(self.floors[g]), int(self.ceilings[g])
            widths = np.arange(low, high + 1, dtype=np.int64)
            widths = widths[(widths % self.step == 0) | (widths == high) | (widths == low)]
            parts = [s(g, whole, widths / max(1, int(self.sizes[g]))) for limit in limits if (s := limit.stairs)]
            costs = np.sum(parts, axis=0)
            if not costs.any():  # no stairs there
                costs = self._costs(g, whole, widths, limits, [limit.most for limit in limits])
            rest = np.minimum.accumulate(np.append(costs[1:], np.inf)[::-1])[::-1]
            good = costs < rest - _TOLERANCE * np.abs(costs)
            good[-1] = True
            out.append(widths[good])
        self._options = out
        return out

    def _costs(self, g: int, kept: Floats, widths: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Floats:
        """What depends on group g, as a share of the limits, at each of these widths."""
        fractions = widths / max(1, int(self.sizes[g]))
        total = np.zeros(len(widths))
        for limit, m in zip(limits, most, strict=True):
            total = total + limit.cost.curve(g, kept, fractions) / m
        return total

    def _value(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> float:
        """The limit that is used most, as a share of it."""
        kept = self.fraction(keep)
        return max(limit.cost.value(kept) / m for limit, m in zip(limits, most, strict=True))

    def _fits(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> bool:
        return self._value(keep, limits, most) <= 1 + 1e-12

    def _loss(self, keep: Ints) -> float:
        return sum(float(lost[k]) for lost, k in zip(self.lost, keep, strict=True))

    def _prices(self, options: list[Ints], limits: Sequence[Limit], most: Sequence[float]) -> Floats:
        """From where the first step goes to where none stays."""
        whole = self.fraction(self.ceilings)
        ratios = []
        for g, widths in enumerate(options):
            if len(widths) > 1:
                costs = self._costs(g, whole, widths, limits, most)
                saved = np.maximum(costs[-1] - costs[:-1], 1e-12)
                ratios.append(self.lost[g][widths[:-1]] / saved)
        values = np.concatenate(ratios) if ratios else np.ones(1)
        values = values[values > 0] if (values > 0).any() else np.ones(1)
        return np.geomspace(float(values.min()) * 0.5, float(values.max()) * 64, _PRICES)

    def _settled(
        self, keep: Ints, price: float, options: list[Ints], limits: Sequence[Limit], most: Sequence[float]
    ) -> Ints:
        """Each group in turn at its best width for the widths of the others, until none changes."""
        keep = keep.copy()
        for _ in range(_SWEEPS):
            changed = False
            for g, widths in enumerate(options):
                if len(widths) < 2:
                    continue
                costs = self._costs(g, self.fraction(keep), widths, limits, most)
                best = int(widths[int(np.argmin(self.lost[g][widths] + price * costs))])
                changed |= best != keep[g]
                keep[g] = best
            if not changed:
                break
        return keep

    def _filled(self, keep: Ints, options: list[Ints], limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """Widen groups, the most score per cost first, as long as one fits."""
        return self._widened(keep.copy(), options, limits, most, lambda g: True)

    def _widened(
        self,
        keep: Ints,
        options: list[Ints],
        limits: Sequence[Limit],
        most: Sequence[float],
        allowed: Callable[[int], bool],
    ) -> Ints:
        blocked = {g for g, widths in enumerate(options) if keep[g] >= widths[-1] or not allowed(g)}
        while len(blocked) < len(options):
            best, rate = -1, -np.inf
            kept = self.fraction(keep)
            for g, widths in enumerate(options):
                if g not in blocked:
                    pair = widths[(widths == keep[g]) | (widths == self._next(widths, keep[g]))]
                    costs = self._costs(g, kept, pair, limits, most)
                    gain = self.lost[g][pair[0]] - self.lost[g][pair[-1]]
                    found = gain / max(costs[-1] - costs[0], 1e-12)
                    best, rate = (g, found) if found > rate else (best, rate)
            new = keep.copy()
            new[best] = self._next(options[best], keep[best])
            if self._fits(new, limits, most):
                keep = new
                if keep[best] >= options[best][-1]:
                    blocked.add(best)
            else:
                blocked.add(best)
        return keep

    @staticmethod
    def _next(widths: Ints, at: int) -> int:
        return int(widths[min(int(np.searchsorted(widths, at, side="right")), len(widths) - 1)])

    @staticmethod
    def _last(widths: Ints, at: int) -> int:
        return int(widths[max(int(np.searchsorted(widths, at, side="left")) - 1, 0)])

    def _exchanged(self, keep: Ints, options: list[Ints], limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """Widen one group and narrow others for it, as long as that keeps more of the score."""
        for _ in range(_EXCHANGES):
            candidates = []
            for g, widths in enumerate(options):
                if keep[g] < widths[-1]:
                    new = self._made_room(keep, g, options, limits, most)
                    if new is not None:
                        candidates.append(new)
            best = min(candidates, key=self._loss, default=keep)
            if self._loss(best) >= self._loss(keep) * (1 - 1e-9):
                break
            keep = self._filled(best, options, limits, most)
        return keep

    def _made_room(
        self, keep: Ints, g: int, options: list[Ints], limits: Sequence[Limit], most: Sequence[float]
    ) -> Ints | None:
        keep = keep.copy()
        keep[g] = self._next(options[g], int(keep[g]))
        start = self._loss(keep)
        while (over := self._value(keep, limits, most) - 1) > 1e-12:
            best, rate = -1, np.inf
            kept = self.fraction(keep)
            for h, widths in enumerate(options):
                narrower = self._last(widths, int(keep[h]))
                if h == g or narrower >= keep[h]:
                    continue
                costs = self._costs(h, kept, np.array([narrower, keep[h]]), limits, most)
                saved = costs[1] - costs[0]
                if saved > 0:
                    loss = self.lost[h][narrower] - self.lost[h][keep[h]]
                    found = loss / min(saved, over)
                    best, rate = (h, found) if found < rate else (best, rate)
            if best < 0 or self._loss(keep) > 1e3 * max(start, 1e-300):
                return None
            keep[best] = self._last(options[best], int(keep[best]))
        return keep
