"""Names that are not there: which one was meant, and what there is, in one form for all messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from ..errors import GraphPruneError


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, or None: the same but for case, what ends with it after a point, the one
    with the fewest letters to change, as long as most of them agree, or what begins with it."""
    wanted, names = str(name).lower(), list(known)
    if not wanted:
        return None
    lower = {other.lower(): other for other in reversed(names)}
    inside = (other for other in names if other.lower().endswith(f".{wanted}"))
    found = lower.get(wanted) or next(inside, None)
    if found is None:
        close = difflib.get_close_matches(wanted, lower, n=1, cutoff=0.6)
        begun = (other for other in names if len(wanted) > 1 and other.lower().startswith(wanted))
        found = lower[close[0]] if close else next(begun, None)
    return found


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """"; did you mean 'this'?" for the end of a message, or nothing."""
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {found!r}?"


def check_choice(where: str, value: Any, known: Collection[Any], others: str = "") -> None:
    """Raise GraphPruneError unless `value` is one of the `known` names, or None where that is among them.

    `where`: the name of the argument. `others`: what else it may be, in words; what that is the caller has looked at.
    """
    if (value is None or isinstance(value, str)) and value in known:
        return
    names = [name for name in known if name is not None]
    listed = " or ".join(map(repr, names)) if len(names) < 3 else f"one of {', '.join(map(repr, names))}"
    rest = (" or None" if None in known else "") + (f", or {others}" if others else "")
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise GraphPruneError(f"{where}: expected {listed}{rest}, got {value!r}{hint}")
