"""Budgets: how wide every group may be so that the whole network costs no more than asked for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ...dependency.axes import Floats
from ...errors import GraphPruneError
from .budgets import BUDGETS
from .costs import CostModel

Ints = npt.NDArray[np.int64]


class UnreachableBudget(GraphPruneError):
    """Not even the least widths allowed keep the budget. `limit`: which is exceeded; `least`: what they cost; None
    where no single limit is to blame."""

    def __init__(self, message: str, limit: Limit | None = None, least: float | None = None) -> None:
        super().__init__(message)
        self.limit, self.least = limit, least


# Steps by which the price of cost is raised, from where nothing goes to where the budget is met.
_STEPS = 64
# How much of a limit must be used to be content, to be called met, and how many exchanges are tried to get there.
_FULL, _NEAR, _EXCHANGES = 0.995, 0.99, 6
# Where that is not enough: by how many steps one group is widened at once, in networks of how many groups at most (in
# others a step of one group is a small part of a budget).
_STRIDES, _FEW = 8, 12
# And where a network is so small, or so few widths are allowed, that there are no more choices than this of all groups
# but one, or of two of them: all are tried.
_TRIED = 2000


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Budget:
    """Upper limits for the pruned network, one or several at once, by name.

    `macs`: multiply-accumulates on the example input; `params`: elements of all parameters; `memory`: bytes of weights
    and of the activations that are alive at the same time, at their highest, on the example input; names that code has
    registered (see CONTRIBUTING.md). A number up to 1 is a fraction of what the original has, a larger one a count.
    These are never exceeded, and met within 1 % where the numbers of channels allow.

    `latency`: a fraction, in (0, 1], of the time that a call of the original takes; `latency_ms`: milliseconds. Both
    are about the `target` of `plan`, and what is measured there counts: see `graphprune.Target`.

    None is no limit. Raises GraphPruneError for an unknown name, with the nearest known one, for numbers out of range,
    and without any limit.

    >>> import graphprune
    >>> graphprune.Budget(macs=0.5, params=100_000)
    Budget(macs=0.5, params=100000)
    """

    _limits: tuple[tuple[str, float], ...]

    def __init__(self, /, *unnamed: object, **limits: float | None) -> None:
        if unnamed:
            raise GraphPruneError(f"budget: say what {unnamed[0]!r} limits, as in Budget(macs=0.5)")
        for name in limits:
            BUDGETS.find(name)
        given = tuple((name, value) for name in BUDGETS if (value := limits.get(name)) is not None)
        for name, value in given:
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
                raise GraphPruneError(
                    f"budget: {name} must be a fraction of the original in (0, 1] or a count, got {value!r}"
                )
        if not given:
            raise GraphPruneError("budget: name at least one limit, such as Budget(macs=0.5) or Budget(params=0.5)")
        latency = limits.get("latency")
        if latency is not None and latency > 1:
            raise GraphPruneError(
                f"budget: latency is a fraction of the original's time in (0, 1], got {latency!r}; for "
                f"milliseconds use latency_ms"
            )
        if latency is not None and limits.get("latency_ms") is not None:
            raise GraphPruneError("budget: latency and latency_ms exclude each other")
        object.__setattr__(self, "_limits", given)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self._limits)})"

    @property
    def timed(self) -> bool:
        """Whether latency is limited."""
        return any(BUDGETS.find(name).timed for name, _ in self._limits)

    def seconds(self, dense: float) -> float:
        """The time allowed for a call, where one of the original takes `dense` seconds."""
        limits = self.limits()
        if "latency_ms" in limits:
            return limits["latency_ms"] / 1000
        return dense * limits.get("latency", 1.0)

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return dict(self._limits)


@dataclasses.dataclass(frozen=True)
class Limit:
    """One cost and the most it may be. `name` and `form`, the format of its numbers, are for messages. `stairs`: of a
    cost that jumps at some widths, the part that does, with arguments as those of `CostModel.curve`."""

    name: str
    cost: CostModel
    most: float
    stairs: Callable[[int, Floats, Floats], Floats] | None = None
    form: str = ",.0f"


def check_least(least: Floats, limits: Sequence[Limit], most: Sequence[float]) -> None:
    """Raise UnreachableBudget if the least fractions that may stay cost above `most`."""
    for limit, m in zip(limits, most, strict=True):
        form, found = limit.form, limit.cost.value(least)
        if found > m * (1 + 1e-12):
            full = limit.cost.full
            raise UnreachableBudget(
                f"budget: {limit.name} cannot be brought to {m:{form}}: with the least number of channels allowed "
                f"{found:{form}} remain ({found / full:.1%} of {full:{form}}); raise the budget or max_ratio, lower "
                f"min_channels, ignore less, or let other things go too (granularity)",
                limit,
                found,
            )


class Widths:
    """Chooses how many units of each group stay, least score lost per cost saved first.

    `scores`: per group, one per unit. `floors`, `ceilings`: the least and the most that each group keeps. `allowed`:
    the widths that a group may have, ascending; its floor and its ceiling are allowed in any case.
    """

    def __init__(
        self,
        scores: Sequence[Floats],
        floors: Sequence[int],
        ceilings: Sequence[int],
        allowed: Sequence[Ints],
        last: bool = True,
    ) -> None:
        """`last`: there are no much finer widths to meet a limit with, so that score is given up for that."""
        self.last = last
        self.ascending = [np.sort(np.asarray(s, np.float64)) for s in scores]
        self.sizes = np.array([len(s) for s in scores], np.int64)
        self.ceilings = np.minimum(np.asarray(ceilings, np.int64), self.sizes)
        self.floors = np.minimum(np.asarray(floors, np.int64), self.ceilings)
        self.options = [
            np.union1d(a[(a >= low) & (a <= high)], [low, high])
            for a, low, high in zip(allowed, self.floors, self.ceilings, strict=True)
        ]
        # by width, from 0 to the size of each group, one group after the other
        self._start = np.concatenate([[0], np.cumsum(self.sizes + 1)[:-1]]).astype(np.int64)
        ends = [_nearest_options(o, int(n)) for o, n in zip(self.options, self.sizes, strict=True)]
        self._below = np.concatenate([below for below, _ in ends]) if ends else np.zeros(0, np.int64)
        self._above = np.concatenate([above for _, above in ends]) if ends else np.zeros(0, np.int64)
        kept = [np.concatenate([[0.0], np.cumsum(s[::-1])]) for s in self.ascending]
        self._best = np.concatenate(kept) if kept else np.zeros(0)

    def choose(self, limits: Sequence[Limit], scale: float = 1.0) -> Ints:
        """The widths for limits multiplied by `scale`.

        The price of cost rises step by step; a unit goes when it is worth less than it costs at the widths reached so
        far (the cost of a layer depends on the groups on both sides). Then what room is left is filled again.

        Raises GraphPruneError when even the floors cost more.
        """
        most = [limit.most * scale for limit in limits]
        keep = self.rough(limits, scale)
        if (keep == self.ceilings).all():
            return keep
        keep = self._exchanged(self._filled(keep, limits, most), limits, most)
        return self._tried(keep, limits, most) if self.last and self._used(keep, limits, most) < _NEAR else keep

    def rough(self, limits: Sequence[Limit], scale: float = 1.0) -> Ints:
        """`choose` without filling what room is left."""
        most = [limit.most * scale for limit in limits]
        check_least(self.fraction(self.floors), limits, most)
        keep = self.ceilings.copy()
        if self._fits(keep, limits, most):
            return keep
        low, high = self._prices(limits, most)
        for price in np.geomspace(low, high, _STEPS):
            new = self._at(price, keep, limits, most)
            if self._fits(new, limits, most):
                return self._between(keep, new, lambda k: self._fits(k, limits, most))
            keep = new
        return self._between(keep, self.floors.copy(), lambda k: self._fits(k, limits, most))

    def fraction(self, keep: Ints) -> Floats:
        return keep / np.maximum(self.sizes, 1)

    def _fits(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> bool:
        kept = self.fraction(keep)
        return all(limit.cost.value(kept) <= m * (1 + 1e-12) for limit, m in zip(limits, most, strict=True))

    def _unit_costs(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Floats:
        """What one unit of each group costs now, as a share of the limits that are exceeded."""
        kept = self.fraction(keep)
        out = np.zeros(len(keep))
        for limit, m in zip(limits, most, strict=True):
            if limit.cost.value(kept) > m:
                out += limit.cost.slopes(kept) / m
        return out / np.maximum(self.sizes, 1)

    def _prices(self, limits: Sequence[Limit], most: Sequence[float]) -> tuple[float, float]:
        """Between the price at which the first unit goes and the one at which none is worth its cost."""
        unit = self._unit_costs(self.sizes, limits, most)
        ratios = [s[s > 0] / u for s, u in zip(self.ascending, unit, strict=True) if u > 0 and len(s)]
        values = np.concatenate(ratios) if ratios else np.ones(1)
        if not len(values):
            return 1.0, 1.0
        return float(values.min()) * 0.5, float(values.max()) * 64

    def _at(self, price: float, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        unit = self._unit_costs(keep, limits, most) * price
        wanted = np.array([len(s) - np.searchsorted(s, u) for s, u in zip(self.ascending, unit, strict=True)], np.int64)
        return np.minimum(self._up(np.minimum(wanted, keep)), keep)

    def _between(self, wide: Ints, narrow: Ints, fits: Callable[[Ints], bool]) -> Ints:
        """The widest widths on the way from `wide`, which does not fit, to `narrow`, which does."""
        low, high = 0.0, 1.0
        best = narrow
        for _ in range(24):
            middle = (low + high) / 2
            keep = self._down(wide - np.ceil((wide - narrow) * middle).astype(np.int64))
            keep = np.minimum(np.maximum(keep, narrow), wide)
            if fits(keep):
                best, high = keep, middle
            else:
                low = middle
        return best

    def _filled(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """Add units back, the best per cost first, as long as one fits."""
        keep = keep.copy()
        blocked = keep >= self.ceilings
        while not blocked.all():
            unit = self._all_unit_costs(keep, limits, most)
            gain = self._gain(keep)
            g = int(np.where(blocked, -np.inf, gain / unit).argmax())
            new = self._wider(keep, g)
            if self._fits(new, limits, most):
                keep = new
                blocked[g] = keep[g] >= self.ceilings[g]
            else:
                blocked[g] = True
        return keep

    def _exchanged(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """Where room is left that no single unit fits into: widen one group and narrow others for it, while that keeps
        more of the score, or with the last widths fills a limit that is not met within 1 %."""
        for _ in range(_EXCHANGES):
            used = self._used(keep, limits, most)
            if used >= _FULL:
                break
            unit = self._all_unit_costs(keep, limits, most)
            gain = np.where(keep < self.ceilings, self._gain(keep), -np.inf)
            candidates = [int(g) for g in np.argsort(-gain / unit, kind="stable")[:_EXCHANGES] if gain[g] > -np.inf]
            options = [o for g in candidates if (o := self._made_room(keep, g, limits, most)) is not None]
            near = [o for o in options if self._used(o, limits, most) >= _NEAR]
            for steps in range(2, _STRIDES + 1) if self.last and used < _NEAR and len(keep) <= _FEW else ():
                if near:
                    break
                wider = [o for g in candidates if (o := self._made_room(keep, g, limits, most, steps)) is not None]
                near = [o for o in wider if self._used(o, limits, most) >= _NEAR]
            best = max(near or (options if used < _NEAR else ()), key=self._kept_score, default=keep)
            if self._kept_score(best) <= self._kept_score(keep) and not (self.last and near and used < _NEAR):
                break
            keep = best
        return keep

    def _tried(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """Of all ways to give the groups, or else two of them, other widths the one that keeps most of the score, among
        those that meet the limits within 1 %; `keep` where there is none, or where there are too many ways."""
        number = [len(options) for options in self.options]
        order = [g for g in np.argsort(number, kind="stable").tolist() if number[g] > 1]
        ways: Iterator[Ints] = iter(())
        if order and math.prod(number[g] for g in order[:-1]) <= _TRIED:
            every = itertools.product(*(self.options[g].tolist() for g in order[:-1]))
            ways = (self._with(keep, order[:-1], widths) for widths in every)
            lasts = order[-1:]
        elif len(order) <= _FEW and sum(number) * len(order) <= _TRIED:
            ways = (self._with(keep, [g], [w]) for g in order for w in self.options[g].tolist())
            lasts = order
        best, score = keep, -math.inf
        for way in ways:
            for h in lasts:
                for width in self._near(way, h, limits, most).tolist():
                    new = self._with(way, [h], [width])
                    if (found := self._kept_score(new)) > score:
                        best, score = new, found
        return best

    def _with(self, keep: Ints, groups: Sequence[int], widths: Sequence[int]) -> Ints:
        new = keep.copy()
        new[groups] = widths
        return new

    def _near(self, keep: Ints, g: int, limits: Sequence[Limit], most: Sequence[float]) -> Ints:
        """The widths of group g with which the limits are kept, and met within 1 %."""
        kept, fractions = self.fraction(keep), self.options[g] / self.sizes[g]
        used = np.zeros(len(fractions))
        for limit, m in zip(limits, most, strict=True):
            curve = limit.cost.curve(g, kept, np.append(fractions, kept[g]))
            used = np.maximum(used, (limit.cost.value(kept) - curve[-1] + curve[:-1]) / m)
        found: Ints = self.options[g][(used <= 1 + 1e-12) & (used >= _NEAR)]
        return found

    def _used(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> float:
        kept = self.fraction(keep)
        return max(limit.cost.value(kept) / m for limit, m in zip(limits, most, strict=True))

    def _made_room(
        self, keep: Ints, g: int, limits: Sequence[Limit], most: Sequence[float], steps_wider: int = 1
    ) -> Ints | None:
        """`keep` with group g some steps wider and others narrower, the least score per cost first; None if they
        cannot be."""
        for _ in range(steps_wider):
            keep = self._wider(keep, g)
        while not self._fits(keep, limits, most):
            unit = self._unit_costs(keep, limits, most)
            lower = self._down(keep - 1)
            steps = np.maximum(keep - lower, 1)
            loss = (self._score(keep) - self._score(lower)) / steps
            possible = (keep > self.floors) & (unit > 0)
            possible[g] = False
            if not possible.any():
                return None
            rest = unit * steps - (self._used(keep, limits, most) - 1)  # room left when a step of one group goes
            last = possible & (rest >= 0) & (rest <= 1 - _NEAR)
            h = int(np.where(last, loss, np.inf).argmin())
            if not last.any():
                h = int(np.where(possible, loss / np.maximum(unit, 1e-300), np.inf).argmin())
            keep[h] = lower[h]
        return self._filled(keep, limits, most)

    def _all_unit_costs(self, keep: Ints, limits: Sequence[Limit], most: Sequence[float]) -> Floats:
        """What one unit of each group costs, as a share of all limits together."""
        kept = self.fraction(keep)
        slopes = sum((c.cost.slopes(kept) / m for c, m in zip(limits, most, strict=True)), np.zeros(len(keep)))
        unit: Floats = np.maximum(slopes / np.maximum(self.sizes, 1), 1e-30)
        return unit

    def _down(self, keep: Ints) -> Ints:
        """The widest allowed widths up to these, the narrowest of all where there are none."""
        found: Ints = self._below[self._start + np.maximum(keep, 0)]
        return found

    def _up(self, keep: Ints) -> Ints:
        """The narrowest allowed widths from these on, the widest of all where there are none."""
        found: Ints = self._above[self._start + np.minimum(keep, self.sizes)]
        return found

    def _score(self, keep: Ints) -> Floats:
        """The score that each group keeps."""
        found: Floats = self._best[self._start + keep]
        return found

    def _gain(self, keep: Ints) -> Floats:
        """The score of the units up to the next width, on average; 0 where there is none."""
        new = self._up(keep + 1)
        gain: Floats = (self._score(new) - self._score(keep)) / np.maximum(new - keep, 1)
        return gain

    def _wider(self, keep: Ints, g: int) -> Ints:
        new = keep.copy()
        new[g] = self._up(keep + 1)[g]
        return new

    def _kept_score(self, keep: Ints) -> float:
        return float(self._score(keep).sum())


def _nearest_options(options: Ints, size: int) -> tuple[Ints, Ints]:
    """For every width up to `size`, the next options below and above it (or the outermost one)."""
    widths = np.arange(size + 1)
    below = np.maximum(np.searchsorted(options, widths, side="right") - 1, 0)
    above = np.minimum(np.searchsorted(options, widths), len(options) - 1)
    return options[below], options[above]
