"""Values of a plan as others may have written them: each of its type, else a TypeError or ValueError says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# No number that a plan is written with comes near; sums of such are finite.
_LARGEST = 1e100


def whole(value: Any) -> int:
    """An integer, and no truth value."""
    if type(value) is not int:
        raise TypeError(f"{str(value)[:40]!r} is no whole number")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise TypeError(f"{str(value)[:40]!r} is no finite number")
    return float(value)


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def listed(value: Any) -> Sequence[Any]:
    """A list; texts are none."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value


def table(value: Any) -> Mapping[str, Any]:
    """An object with names."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{str(value)[:40]!r} is no object with names")
    return value


def axis(value: Any) -> int:
    """The number of an axis as the name of an entry: "0", "1"..."""
    found = int(text(value)) if text(value).isascii() and text(value).isdigit() and len(value) < 4 else -1
    if str(found) != value:
        raise ValueError(f"{value[:40]!r} is no number of an axis")
    return found


def indices(value: Any) -> tuple[int, ...]:
    """Whole numbers. A tuple was made by this, and is shared and not copied: a file may name one list many times."""
    return value if isinstance(value, tuple) else tuple(map(whole, listed(value)))
