"""Local search over widths: what one group gains is taken from others where it costs least score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...dependency.axes import Floats
from .budget import Limit

Ints = npt.NDArray[np.int64]
_EXACT = 1e-12
# Passes over all groups, and how far above the best choice a way to a better one may lead.
_PASSES, _HOPELESS = 6, 1.15


class Ground:
    """What does not change while widths are looked for: the options of every group (ascending widths), the score that
    is lost at each, the limits and the most that each may be. Groups are rows, options columns; what is not there is
    infinitely bad."""

    def __init__(
        self,
        options: Sequence[Ints],
        lost: Sequence[Floats],
        sizes: Ints,
        limits: Sequence[Limit],
        most: Sequence[float],
    ) -> None:
        self.limits, self.most, self.sizes = limits, np.asarray(most, np.float64), sizes
        self.options = options
        self.fractions = [o / max(1, int(n)) for o, n in zip(options, sizes, strict=True)]
        self.last = np.array([len(o) - 1 for o in options], np.int64)
        width = int(self.last.max(initial=0)) + 1
        self.lost = np.full((len(options), width), np.inf)
        self.exists = np.zeros((len(options), width), bool)
        for g, values in enumerate(lost):
            self.lost[g, : len(values)] = values
            self.exists[g, : len(values)] = True
        self.rows = np.arange(len(options))
        self.columns = np.arange(width)
        self.partners = [
            sorted(set[int]().union(*(limit.cost.partners(g) for limit in limits)) - {g}) for g in self.rows.tolist()
        ]

    def curve(self, group: int, kept: Floats) -> Floats:
        """Shares of each limit (rows) at each option of the group."""
        out = np.zeros((len(self.limits), len(self.columns)))
        for row, limit, most in zip(out, self.limits, self.most, strict=True):
            found = limit.cost.curve(group, kept, self.fractions[group])
            row[: len(found)] = found / most
        return out


class Choice:
    """One option for every group, with what each of the others would cost there.

    `at`: the option's index by group. `used`: shares of the limits. `loss`: the score that is gone."""

    def __init__(self, ground: Ground, at: Ints) -> None:
        self.ground, self.at = ground, at.copy()
        self.kept = np.array([f[i] for f, i in zip(ground.fractions, at.tolist(), strict=True)], np.float64)
        self._curves = np.zeros((len(ground.rows), len(ground.limits), len(ground.columns)))
        self._stale = set(ground.rows.tolist())
        self.used = np.array([limit.cost.value(self.kept) for limit in ground.limits]) / ground.most
        self.loss = float(ground.lost[ground.rows, at].sum())

    def copy(self) -> Choice:
        new = object.__new__(Choice)
        new.ground, new.loss, new._stale = self.ground, self.loss, set(self._stale)
        new.at, new.kept, new.used = self.at.copy(), self.kept.copy(), self.used.copy()
        new._curves = self._curves.copy()
        return new

    @property
    def curves(self) -> Floats:
        """By group, limit and option: shares of the limits, the other groups as they are."""
        for g in self._stale:
            self._curves[g] = self.ground.curve(g, self.kept)
        self._stale.clear()
        return self._curves

    @property
    def fits(self) -> bool:
        return bool(self.used.max() <= 1 + _EXACT)

    def curve(self, group: int) -> Floats:
        """The row of `curves` of one group."""
        if group in self._stale:
            self._curves[group] = self.ground.curve(group, self.kept)
            self._stale.discard(group)
        found: Floats = self._curves[group]
        return found

    def move(self, group: int, option: int) -> None:
        """Take another option."""
        now, curve, lost = int(self.at[group]), self.curve(group), self.ground.lost[group]
        if option == now:
            return
        self.used += curve[:, option] - curve[:, now]
        self.loss += float(lost[option] - lost[now])
        self.at[group] = option
        self.kept[group] = self.ground.fractions[group][option]
        self._stale.update(self.ground.partners[group])

    def changes(self) -> tuple[Floats, Floats]:
        """What every option would change: shares of the limits (groups, limits, options) and loss (groups, options)."""
        g = self.ground
        curves = self.curves
        return (
            curves - curves[g.rows, :, self.at][:, :, None],
            g.lost - g.lost[g.rows, self.at][:, None],
        )

    def widths(self) -> Ints:
        return np.array([o[i] for o, i in zip(self.ground.options, self.at.tolist(), strict=True)], np.int64)


def fill(choice: Choice, held: int = -1) -> None:
    """Widen groups, the most score per cost first, as long as something fits; `held` stays as it is."""
    ground = choice.ground
    while True:
        cost, loss = choice.changes()
        free = (choice.used[None, :, None] + cost <= 1 + _EXACT).all(1) & ground.exists & (loss < 0)
        if held >= 0:
            free[held] = False
        if not free.any():
            return
        rate = np.where(free, -loss / np.maximum(cost.sum(1), _EXACT), -np.inf)
        group, option = np.unravel_index(int(rate.argmax()), rate.shape)
        choice.move(int(group), int(option))


def narrow(choice: Choice, held: int = -1, worst: float = np.inf) -> bool:
    """Narrow groups, the least score per cost saved first, until the limits are kept; `held` stays as it is. False
    where that is not possible, or loses more than `worst` on the way."""
    ground = choice.ground
    while not choice.fits:
        if choice.loss > worst:
            return False
        cost, loss = choice.changes()
        over = np.maximum(choice.used - 1, 0)
        saved = np.minimum(-cost, over[None, :, None]).sum(1)  # what is saved beyond the limit is of no use
        possible = (ground.columns < choice.at[:, None]) & (saved > _EXACT)
        if held >= 0:
            possible[held] = False
        if not possible.any():
            return False
        rate = np.where(possible, loss / np.where(possible, saved, 1.0), np.inf)
        group, option = np.unravel_index(int(rate.argmin()), rate.shape)
        choice.move(int(group), int(option))
    return choice.loss <= worst


def polish(choice: Choice) -> Choice:
    """Give one group another width, near or far, and let the others make room or use what becomes free, as long as that
    keeps more of the score."""
    best = choice.copy()
    fill(best)
    quiet = 0  # groups in a row at which nothing was better
    groups = np.argsort(-np.abs(best.changes()[0]).max((1, 2)), kind="stable").tolist()
    groups = [g for g in groups if best.ground.last[g] > 0]
    for g in groups * _PASSES:
        better = _better(best, g)
        quiet = 0 if better is not None else quiet + 1
        best = better or best
        if quiet == len(groups):
            break
    return best


def _better(best: Choice, group: int) -> Choice | None:
    found: Choice | None = None
    for option in _targets(int(best.at[group]), int(best.ground.last[group])):
        new = best.copy()
        new.move(group, option)
        if narrow(new, group, _HOPELESS * best.loss):
            fill(new, group)
            if new.loss < (found or best).loss * (1 - 1e-9):
                found = new
    return found


def _targets(at: int, last: int) -> list[int]:
    """Options at distances 1, 2, 4, ... on both sides, and both ends."""
    steps = [2**k for k in range(last.bit_length())]
    near = {at + s for s in steps} | {at - s for s in steps} | {0, last}
    return sorted(i for i in near if 0 <= i <= last and i != at)
