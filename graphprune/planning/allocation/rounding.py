"""Which widths a group may have, and which of them the one becomes that is wished for: the only place that rounds.

A width that is no multiple of what a runtime computes at once costs as much as the next multiple, and often more: some
runtimes leave their fast kernels altogether. "auto" allows the widths that were at least as fast as the next larger
ones in every runtime measured (docs/widths.md): multiples of 16 where a group is wide, of 8 and 4 where it is narrow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...dependency import GroupKind
from ...errors import GraphPruneError
from ...support.numbers import check_integer, is_integer

Ints = npt.NDArray[np.int64]
RoundTo = int | str
AUTO, FINE = "auto", "auto, finer"

# (step, from this width on): multiples of the step from there to where the next one begins. The second is for networks
# that are too small to come near what is asked with the first.
_GRIDS = {AUTO: ((1, 1), (4, 4), (8, 16), (16, 32)), FINE: ((1, 1), (4, 16), (16, 32))}
# How far the mean share that goes may be from the one asked for before finer widths are taken.
NEAR = 0.02
# Multiples that budgets fall back on where the widths of "auto" are too coarse to use them.
_FINER: tuple[RoundTo, ...] = (4, 1)
_LITTLE = 1e-3  # of what is asked in total


def nearest(value: float) -> int:
    """Rounding to nearest, halves up."""
    return math.floor(value + 0.5)


def lost(ratio: float, number: float) -> int:
    """How many of so many things a ratio takes."""
    return nearest(ratio * number)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The options of a request that widths depend on, checked: which are allowed, and what a wish becomes by itself.
    What many wishes become together is `on_average`.

    `round_to`, `min_channels`, `max_ratio`: the arguments of `plan`. Raises GraphPruneError for what none can be.
    """

    round_to: RoundTo = AUTO
    min_channels: int = 1
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        step, least, limit = self.round_to, self.min_channels, self.max_ratio
        if not is_integer(step, 1) and not (isinstance(step, str) and step == AUTO):
            raise GraphPruneError(f'round_to: expected "auto" or an integer of at least 1, got {step!r}')
        check_integer("min_channels", least, 1)
        if isinstance(limit, bool) or not isinstance(limit, (int, float, np.floating)) or not 0 < limit <= 1:
            raise GraphPruneError(
                f"max_ratio: expected the largest fraction that a group may lose, in (0, 1], got {limit!r}"
            )

    @property
    def auto(self) -> bool:
        """Whether widths are those that runtimes like."""
        return self.round_to == AUTO

    @property
    def steps(self) -> bool:
        """Whether some widths are not allowed."""
        return self.round_to != 1

    @property
    def finer(self) -> tuple[Rounding, ...]:
        """This one, and those that may take its place where a network is too small for its widths."""
        return (self, *(dataclasses.replace(self, round_to=step) for step in _FINER)) if self.auto else (self,)

    def most(self, number: int) -> int:
        """How many of so many layers, or other wholes, may go."""
        return math.floor(self.max_ratio * number + 1e-9)

    def floor(self, size: int) -> int:
        """The least number of `size` units that must stay, whatever `min_channels` says."""
        return min(size, max(1, math.ceil(size * (1 - self.max_ratio) - 1e-9)))

    def least(self, size: int) -> int:
        """The least number of the `size` units of a group that must stay."""
        return max(self.floor(size), min(self.min_channels, size))

    def allowed(self, size: int, kind: GroupKind) -> Ints:
        """The widths that a group of this size and kind may have, ascending; those below `least` too."""
        return widths(size, self.round_to, kind.is_head)

    def narrowest(self, size: int, possible: Ints) -> int:
        """The least of these widths, the last of which is `size`, that is not below `least`."""
        return int(possible[np.searchsorted(possible, self.least(size))])

    def alone(self, wish: int, size: int) -> int:
        """What the wish for a group becomes that is rounded by itself; under "auto" only kept at or above `least`."""
        if isinstance(self.round_to, int) and self.round_to > 1 and wish < size:
            wish = min(size, _multiple(wish, self.round_to))
        return max(self.least(size), wish)

    def part(self, wish: float, units: int, size: int, ratio: float | None) -> int:
        """How many of `units` stay, which are a part of a group of `size`, of which `wish` stay. `ratio`: of what goes,
        where nothing but that has made the wish: then parts are rounded from it."""
        if units == size or wish == size:
            return min(units, int(wish))
        share = nearest(wish * units / size) if ratio is None or self.steps else units - lost(ratio, units)
        return max(min(units, 1), min(units, share))

    def ends(self, wish: float, units: int, size: int, kind: GroupKind, floor: int, grid: str) -> tuple[int, int]:
        """The widths of this grid below and above what is wished for `units`, which are all or a part of a group of
        `size`; the same where there is no choice. At least `floor` stay. Whole heads are rounded to nearest."""
        least = max(floor, math.ceil(min(self.min_channels, size) * units / size))
        if kind.is_head:
            keep = max(units - nearest(round(units - wish, 9)), min(least, units), 1)
            return keep, keep
        return around(wish, widths(units, grid), least)

    def holds(self, wish: float, size: int) -> str:
        """Which option keeps all of a group's `size` units where the wish is less: "ratio" where the wish itself is
        nearest to that, "min_channels", "max_ratio" or "round_to"; empty where none does."""
        if nearest(size - wish) < 1:
            return "ratio"
        if self.min_channels >= size:
            return "min_channels"
        if self.floor(size) >= size:
            return "max_ratio"
        step = self.round_to
        return "round_to" if isinstance(step, int) and step > 1 and _multiple(wish, step) >= size else ""


def _multiple(wish: float, step: int) -> int:
    """The multiple nearest to a wish, and not 0."""
    return max(step, nearest(wish / step) * step)


@functools.lru_cache(maxsize=4096)
def widths(size: int, round_to: RoundTo, whole: bool = False) -> Ints:
    """The widths that a group of `size` units may have, ascending; `size` itself is the last. `whole`: units that are
    many channels each, such as heads, of which "auto" takes any number."""
    every = np.arange(1, size + 1, dtype=np.int64)
    if isinstance(round_to, str):
        steps = np.ones(size, np.int64)
        for step, start in () if whole else _GRIDS[round_to]:
            steps[start - 1 :] = step
        allowed = every % steps == 0
    else:
        allowed = every % int(round_to) == 0
    allowed[-1] = True
    found: Ints = every[allowed]
    found.setflags(write=False)
    return found


@dataclasses.dataclass(frozen=True)
class Item:
    """What gets the lower or the upper of two widths as a whole: one or several groups, or parts of them.

    Shares of groups, times what a group counts: what is `asked` to go, and what is gone at the upper width (`less`) and
    at the lower one (`more`; the same where there is no choice). `loss`: the score that goes from the one to the other.
    """

    asked: float
    less: float
    more: float
    loss: float


def around(asked: float, allowed: Ints, least: int) -> tuple[int, int]:
    """The allowed widths of at least `least` below and above the one asked for."""
    possible = allowed[allowed >= min(least, int(allowed[-1]))]
    above = min(int(np.searchsorted(possible, asked - 1e-9)), len(possible) - 1)
    below = above if possible[above] <= asked + 1e-9 else max(above - 1, 0)
    return int(possible[below]), int(possible[above])


def on_average(items: Sequence[Item]) -> tuple[list[bool], float]:
    """Which items get their lower width, so that the share gone in total is as near as can be to what is asked; and how
    far it is. What costs least score for the share it takes is rounded down first; of equals what is nearest to its
    lower width. Items that hardly count in the total are rounded to nearest."""
    asked = math.fsum(item.asked for item in items)
    small = [item.more - item.less < _LITTLE * asked for item in items]
    down = [s and item.more - item.asked < item.asked - item.less for s, item in zip(small, items, strict=True)]
    gone = math.fsum(item.more if d else item.less for d, item in zip(down, items, strict=True))

    def price(i: int) -> tuple[float, float, int]:
        item = items[i]
        step = item.more - item.less
        return item.loss / step, (item.more - item.asked) / step, i

    for i in sorted((i for i, item in enumerate(items) if item.more > item.less and not small[i]), key=price):
        step = items[i].more - items[i].less
        if abs(gone + step - asked) < abs(gone - asked) - 1e-12:
            down[i] = True
            gone += step
    return down, abs(gone - asked)
