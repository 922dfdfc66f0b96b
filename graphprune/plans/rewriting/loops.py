"""Loops over sizes: `range` is the one place where Python takes a number without asking the number."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ...tracing.origin import is_traced

_range = builtins.range


@contextlib.contextmanager
def watched_ranges(note: Callable[[Any], None]) -> Iterator[None]:
    """Call `note` with every traced bound of a `range`; the loops themselves run as ever."""

    class Watched(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, _range)

        def __call__(cls, *bounds: Any) -> Any:
            for bound in bounds:
                if is_traced(bound):
                    note(bound)
            return _range(*bounds)

    class WatchedRange(metaclass=Watched):
        pass

    before = builtins.range
    builtins.range = WatchedRange  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        builtins.range = before  # type: ignore[misc]
