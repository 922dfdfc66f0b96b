"""Changes that are put back before an interrupt gets through.

Python runs a signal's handler between any two instructions, also between `finally:` and the first thing after it. Where
something of the user's, or of the process, is changed for a while,

    with shielded():
        change()
        try:
            with interruptible():
                run()  # long, the user's: Ctrl-C stops it
        finally:
            put_back()

lets a signal through only inside `interruptible`. One that comes at another time waits until the shield is gone, and
one that comes from within is the last one until then: what it unwinds is not interrupted again. A context manager that
changes something yields inside `lifted()` of its shield instead. Handlers run in the main thread only, so elsewhere all
of this does nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.utils.weak

# A second Ctrl-C, this long after the first in seconds, is let through: whatever caught the first one goes on.
_PATIENCE = 2.0
# How far up the stack a context manager may be on its way.
_LEVELS = 12
_CLEANING = frozenset((contextlib.__file__, weakref.__file__, torch.utils.weak.__file__))
# A signal between two things comes again after so long, in seconds.
_SOON = 0.002


class _Shield:
    """What is known of signals while the outermost `shielded` block lasts."""

    def __init__(self) -> None:
        self.depth = 0
        self.open = False
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.waiting: list[int] = []
        self.raised: float | None = None
        self.error: BaseException | None = None

    def handle(self, number: int, frame: FrameType | None, waited: bool = False) -> None:
        """Stands in for every handler: now, or when the shield goes. `waited`: the moment is a good one."""
        handler = self.handlers[number]
        if not self.depth:
            handler(number, frame)
            return
        again = self.raised is not None and time.monotonic() - self.raised > _PATIENCE
        if not self.open and not again:
            if number not in self.waiting:
                self.waiting.append(number)
            return
        if not waited and frame is not None and _between(frame):
            _again_soon(number)
            return
        was, self.open = self.open, False
        try:
            handler(number, frame)
        except BaseException as error:
            self.raised, self.error = time.monotonic(), error
            with contextlib.suppress(AttributeError):  # exceptions with slots
                error._graphprune_signal = True  # type: ignore[attr-defined]
            raise
        self.open = was  # a handler that only takes note

    def install(self) -> None:
        try:
            self.depth = 1
            for number in (signal.SIGINT, *signal.valid_signals()):
                handler = signal.getsignal(number)
                if callable(handler) and handler != self.handle:
                    self.handlers[number] = handler
                    signal.signal(number, self.handle)
        except BaseException:  # a signal whose handler was not replaced yet
            self.remove()
            raise

    def remove(self) -> None:
        """Give every handler its place back and let through what has waited. With no depth, what comes goes straight
        to the handler that it is for."""
        try:
            self.depth = 0
            waiting = self._restored()
        except BaseException:
            self._restored()
            raise
        for number in waiting:
            signal.raise_signal(number)

    def _restored(self) -> list[int]:
        """What has waited, with every handler in its place again."""
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, handler)
        waiting = self.waiting
        self.handlers, self.waiting, self.raised, self.error, self.open = {}, [], None, None, False
        return waiting


_shield = _Shield()


def from_signal(error: BaseException) -> bool:
    """A signal's handler raised it: nothing went wrong, and nothing else is to be tried."""
    return getattr(error, "_graphprune_signal", False)


def _between(frame: FrameType) -> bool:
    """A context manager is on its way in or out: raised now, an interrupt would come after it has changed something and
    before anybody is to put it back, or the reverse. Or something is being forgotten, where Python drops exceptions."""
    if frame.f_code.co_filename in _CLEANING or frame.f_code.co_name == "__del__":
        return True
    above: FrameType | None = frame
    for _ in range(_LEVELS):
        if above is None or above.f_code.co_filename == __file__:  # here every moment is a good one
            return False
        if above.f_code.co_name in ("__enter__", "__exit__"):
            return True
        above = above.f_back
    return False


def _again_soon(number: int) -> None:
    timer = threading.Timer(_SOON, signal.raise_signal, (number,))
    timer.daemon = True
    timer.start()


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class shielded:
    """See the module's docstring."""

    def __enter__(self) -> shielded:
        self._active = _in_main_thread()
        if self._active:
            self._before, _shield.open = _shield.open or not _shield.depth, False
            if _shield.depth:
                _shield.depth += 1
            else:
                _shield.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: object) -> None:
        if not self._active:
            return
        if _shield.depth == 1:
            interrupt = _shield.error
            _shield.remove()
            if interrupt is not None and isinstance(value, Exception) and value is not interrupt:
                raise interrupt from value  # what it met on its way has made another error of it
            return
        _shield.depth -= 1
        _shield.open = self._before and _shield.raised is None
        _deliver()

    def lifted(self) -> interruptible:
        """Signals get through inside where they did outside of this block: for the `yield` of a context manager."""
        return interruptible(self._active and self._before)


class interruptible:
    """Signals get through inside. Outside of `shielded` it does nothing."""

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        self._active = self._wanted and _in_main_thread() and _shield.depth > 0 and _shield.raised is None
        if self._active:
            _shield.open = True
            _deliver()

    def __exit__(self, *error: object) -> None:
        if self._active:
            _shield.open = False


def _deliver() -> None:
    """Let through what has waited."""
    while _shield.open and _shield.waiting:
        _shield.handle(_shield.waiting.pop(0), sys._getframe(), waited=True)  # as python does, with a frame
