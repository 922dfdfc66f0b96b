"""A limit on how long something may take, for what could wait for ever."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def time_limit(seconds: int, expired: Exception) -> Iterator[None]:
    """Raise `expired` after so many seconds, where the system has alarms; never for 0."""

    def ring(*_: Any) -> None:
        raise expired

    if not seconds or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
