"""Loops over sizes: `range` is the one place where Python takes a number without asking the number."""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ...support.interrupts import shielded
from ...tracing.origin import is_traced
from ...tracing.patches import patched

_range = builtins.range
_running = threading.local()


class _Watched(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _range)

    def __call__(cls, *bounds: Any) -> Any:
        notes = getattr(_running, "notes", None)
        if notes:
            for bound in bounds:
                if is_traced(bound):
                    notes[-1](bound)
        return _range(*bounds)


class WatchedRange(metaclass=_Watched):
    """Stands in for `range`."""


@contextlib.contextmanager
def watched_ranges(note: Callable[[Any], None]) -> Iterator[None]:
    """Call `note` with every traced bound of a `range` on this thread; the loops themselves run as ever."""
    notes = _running.__dict__.setdefault("notes", [])
    with shielded() as shield:
        notes.append(note)
        try:
            with patched(builtins, "range", lambda _: WatchedRange, whole=True), shield.lifted():
                yield
        finally:
            notes.pop()
