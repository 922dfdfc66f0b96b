"""Which widths a group may have, and asked shares met on average with them.

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

from ...errors import GraphPruneError

Ints = npt.NDArray[np.int64]
RoundTo = int | str
AUTO, FINE = "auto", "auto, finer"

# (step, from this width on): multiples of the step from there to where the next one begins. The second is for networks
# that are too small to come near what is asked with the first.
_GRIDS = {AUTO: ((1, 1), (4, 4), (8, 16), (16, 32)), FINE: ((1, 1), (4, 16), (16, 32))}
# How far the mean share that goes may be from the one asked for before finer widths are taken.
NEAR = 0.02
_LITTLE = 1e-3  # of what is asked in total


def check_round_to(value: RoundTo) -> None:
    """Raise GraphPruneError for anything but "auto" and integers of at least 1."""
    if isinstance(value, str) and value == AUTO:
        return
    if isinstance(value, (bool, str)) or not isinstance(value, int) or value < 1:
        raise GraphPruneError(f'round_to: expected "auto" or an integer of at least 1, got {value!r}')


def nearest(value: float) -> int:
    """Rounding to nearest, halves up."""
    return math.floor(value + 0.5)


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
