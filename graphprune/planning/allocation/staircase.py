"""Widths under costs that are stairs: a multiple-choice knapsack over the steps of every group.

Several starts, each near a different optimum: a price per cost that rises from where nothing goes (each group in turn
at its best width for those of the others, as a layer's cost depends on the groups on both of its sides), a price that
falls from where nothing stays, and the widths of the chooser for costs without stairs. Each is then improved by
exchanges, and the best is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...dependency.axes import Floats
from .budget import Limit, UnreachableBudget, Widths, check_least
from .exchange import Choice, Ground, fill, narrow, polish

Ints = npt.NDArray[np.int64]
_PRICES, _SWEEPS, _BISECTIONS = 40, 12, 12
# A price at which scores do not count.
_ANY = 1e30
# A step is worth having if every larger width costs at least this much more.
_TOLERANCE = 0.002


class StairWidths:
    """Chooses how many units of each group stay; arguments as those of `Widths`."""

    def __init__(
        self, scores: Sequence[Floats], floors: Sequence[int], ceilings: Sequence[int], allowed: Sequence[Ints]
    ) -> None:
        self._plain = Widths(scores, floors, ceilings, allowed)
        self.sizes, self.floors, self.ceilings = self._plain.sizes, self._plain.floors, self._plain.ceilings
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
        lost = [score[widths] for score, widths in zip(self.lost, options, strict=True)]
        ground = Ground(options, lost, self.sizes, limits, most)
        whole = Choice(ground, ground.last)
        if whole.fits:
            return self.ceilings.copy()
        least = _settled(Choice(ground, np.zeros_like(ground.last)), _ANY)
        check_least(least.kept, limits, most)
        starts = [least, self._falling(whole), self._rising(least, whole), *self._without_stairs(ground, scale)]
        for start in starts:
            fill(start)
        return min((polish(start) for start in starts if start.fits), key=lambda c: c.loss).widths()

    def fraction(self, keep: Ints) -> Floats:
        return keep / np.maximum(self.sizes, 1)

    def _steps(self, limits: Sequence[Limit]) -> list[Ints]:
        """Per group, ascending: the widths that no larger one is as cheap as, the others kept whole; and the floor."""
        if self._options is not None:
            return self._options
        whole = self.fraction(self.ceilings)
        out = []
        for g in range(len(self.sizes)):
            widths = self._plain.options[g]
            parts = [s(g, whole, widths / max(1, int(self.sizes[g]))) for limit in limits if (s := limit.stairs)]
            costs = np.sum(parts, axis=0)
            if not costs.any():  # no stairs there
                fractions = widths / max(1, int(self.sizes[g]))
                costs = np.sum([limit.cost.curve(g, whole, fractions) / limit.most for limit in limits], axis=0)
            rest = np.minimum.accumulate(np.append(costs[1:], np.inf)[::-1])[::-1]
            good = costs < rest - _TOLERANCE * np.abs(costs)
            good[[0, -1]] = True
            out.append(widths[good])
        self._options = out
        return out

    def _falling(self, whole: Choice) -> Choice:
        """From everything, under a price that rises until the limits are kept."""
        choice, prices = whole, _prices(whole)
        low, high, fitting = prices[0], prices[-1], None
        for price in prices:
            new = _settled(choice, price)
            if new.fits:
                fitting, high = new, price
                break
            choice, low = new, price
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            new = _settled(choice, middle)
            if new.fits:
                fitting, high = new if fitting is None or new.loss <= fitting.loss else fitting, middle
            else:
                choice, low = new, middle
        if fitting is None:
            fitting = choice.copy()
            narrow(fitting)
        return fitting

    def _rising(self, least: Choice, whole: Choice) -> Choice:
        """From the least, under a price that falls as long as the limits are kept."""
        choice, prices = least, _prices(whole)[::-1]
        low, high = prices[-1], prices[0]
        for price in prices:
            new = _settled(choice, price)
            if not new.fits:
                low = price
                break
            choice, high = new, price
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            new = _settled(choice, middle)
            if new.fits:
                choice, high = new, middle
            else:
                low = middle
        return choice.copy()

    def _without_stairs(self, ground: Ground, scale: float) -> list[Choice]:
        """The plain chooser's widths, each at the step above it, or below where that is needed; none where its floors,
        which may be dearer than steps above them, cost too much."""
        try:
            keep = self._plain.rough(ground.limits, scale)
        except UnreachableBudget:
            return []
        above = [min(int(np.searchsorted(o, k)), len(o) - 1) for o, k in zip(ground.options, keep, strict=True)]
        choice = Choice(ground, np.array(above, np.int64))
        narrow(choice)
        return [choice]


def _prices(whole: Choice) -> list[float]:
    """From where the first step goes to where none stays."""
    cost, loss = whole.changes()
    saved = -cost.sum(1)
    dear = (saved > 1e-12) & (loss > 0) & whole.ground.exists
    ratios = loss[dear] / saved[dear]
    values = ratios if len(ratios) else np.ones(1)
    found: list[float] = np.geomspace(float(values.min()) * 0.5, float(values.max()) * 64, _PRICES).tolist()
    return found


def _settled(choice: Choice, price: float) -> Choice:
    """Each group in turn at its best width for the widths of the others, until none changes."""
    choice = choice.copy()
    ground = choice.ground
    for _ in range(_SWEEPS):
        changed = False
        for g in np.nonzero(ground.last)[0].tolist():
            best = int((ground.lost[g] + price * choice.curve(g).sum(0)).argmin())
            changed |= best != choice.at[g]
            choice.move(g, best)
        if not changed:
            break
    return choice
