"""Checks of numbers that users pass, in the same words everywhere."""

from __future__ import annotations

import math
from typing import Any

from ..errors import GraphPruneError


def is_integer(value: Any, least: int) -> bool:
    """A Python integer of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise GraphPruneError unless `value` is an integer of at least `least`."""
    if not is_integer(value, least):
        raise GraphPruneError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False, optional: bool = False
) -> None:
    """Raise GraphPruneError unless `value` is a finite number from `low` to `high`. `above`: not `low` itself;
    `optional`: or None."""
    if optional and value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        limit = f"above {low:g}" if above else f"of at least {low:g}"
        if not math.isinf(high):
            limit = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise GraphPruneError(f"{name}: expected a number {limit}{' or None' if optional else ''}, got {value!r}")
