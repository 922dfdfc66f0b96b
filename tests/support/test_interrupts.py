"""Signals wait until what was changed is back, wherever they come."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest

from graphprune.support import interrupts
from graphprune.support.interrupts import interruptible, shielded


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    levels, interrupts._LEVELS = interrupts._LEVELS, 0  # signals come at once, wherever a test sends them
    yield
    interrupts._LEVELS = levels
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupts._shield.depth == 0 and not interrupts._shield.handlers and not interrupts._shield.waiting
    signal.signal(signal.SIGINT, before)


class Thing:
    """Something of the user's that is changed for a while."""

    def __init__(self) -> None:
        self.changed = False
        self.begun = 0

    def use(self) -> None:
        with shielded():
            self.begun += 1
            self.changed = True
            try:
                with interruptible():
                    self.long_run()
            finally:
                self.changed = False

    def nested(self) -> None:
        with shielded():
            self.begun += 1
            self.changed = True
            try:
                with interruptible():
                    Thing().use()
            finally:
                self.changed = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with shielded() as shield:
            self.begun += 1
            self.changed = True
            try:
                with shield.lifted():
                    yield
            finally:
                self.changed = False

    def managed(self) -> None:
        with self.held():
            self.long_run()

    def several(self) -> None:
        with shielded(), self.held(), self.held(), interruptible():
            self.long_run()

    def long_run(self) -> None:
        for _ in range(3):
            sum(range(3))


def signalled_at(event: int, run: Callable[[], None], number: int = signal.SIGINT) -> tuple[bool, int]:
    """Run with a signal at the given line or call of this library or this file; whether it came out, and the events."""
    seen = 0

    def watch(frame: FrameType, what: str, _value: Any) -> Any:
        nonlocal seen
        seen += what != "return"  # where signals are never looked at
        if seen == event and what != "return":
            signal.raise_signal(number)
        return watch

    def ours(code: CodeType) -> bool:
        # a function that only uses a context manager is never asked about signals on its way out of the block
        return code.co_filename == interrupts.__file__ or (
            code.co_filename == __file__ and code.co_name not in ("managed", "several")
        )

    sys.settrace(lambda frame, *_: watch if ours(frame.f_code) else None)
    try:
        run()
    except KeyboardInterrupt:
        return True, seen
    finally:
        sys.settrace(None)
    return False, seen


@pytest.mark.parametrize("name", ["use", "nested", "managed", "several"])
def test_a_signal_at_any_moment_leaves_the_thing_whole_and_comes_out(name: str) -> None:
    out, total = signalled_at(0, getattr(Thing(), name))
    assert not out and total > 60
    for event in range(1, total + 1):
        thing = Thing()
        out, _ = signalled_at(event, getattr(thing, name))
        assert not thing.changed, event
        assert out, event
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, event
        assert interrupts._shield.depth == 0 and not interrupts._shield.waiting


def test_a_lifted_shield_lets_through_what_the_one_around_it_does() -> None:
    moments = []
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with shielded():
            with Thing().held():
                signal.raise_signal(signal.SIGINT)
                moments.append("inside")
            moments.append("after")
    assert moments == ["inside", "after"]
    with pytest.raises(KeyboardInterrupt), Thing().held():
        signal.raise_signal(signal.SIGINT)
        moments.append("never")
    assert len(moments) == 2


def test_another_signal_waits_too() -> None:
    def alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        moments = []
        with pytest.raises(TimeoutError), shielded():
            signal.raise_signal(signal.SIGALRM)
            moments.append("later")
        assert moments == ["later"] and signal.getsignal(signal.SIGALRM) is alarm
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_only_takes_note_is_called_and_the_run_goes_on() -> None:
    noted = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    try:
        with shielded():
            signal.raise_signal(signal.SIGUSR1)
            assert not noted
            with interruptible():
                assert noted == [signal.SIGUSR1]
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR1)
                assert len(noted) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_always_gets_a_frame() -> None:
    """A sampling profiler looks at it."""
    frames: list[object] = []
    before = signal.signal(signal.SIGTERM, lambda _, frame: frames.append(frame))
    try:
        with interrupts.shielded():
            signal.raise_signal(signal.SIGTERM)
            assert not frames
            with interrupts.interruptible():
                assert len(frames) == 1
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(frames) == 2 and all(isinstance(frame, FrameType) for frame in frames)


def test_what_an_interrupt_unwinds_is_not_interrupted_again() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), shielded():
        try:
            with interruptible():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("put back")
    assert done == ["put back"]


def test_an_interrupt_that_was_caught_does_not_make_the_rest_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_PATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt), shielded():
        with interruptible(), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was not let through")


def test_a_context_manager_gets_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted where nobody would put back what it has changed, or it has changed nothing yet that is put back."""
    monkeypatch.setattr(interrupts, "_LEVELS", 12)
    on = []

    class Mode:
        def __enter__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            on.append(1)

        def __exit__(self, *error: object) -> None:
            on.pop()

    with pytest.raises(KeyboardInterrupt), shielded(), interruptible(), Mode():
        assert on
        while True:
            time.sleep(0.001)
    assert not on


def test_an_interrupt_of_which_a_library_made_another_error() -> None:
    with pytest.raises(KeyboardInterrupt), shielded(), interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise TypeError("cannot compare") from interrupt
    with pytest.raises(TypeError, match="no interrupt"), shielded(), interruptible():
        raise TypeError("no interrupt")


def test_other_threads_leave_the_handlers_alone() -> None:
    seen = []

    def run() -> None:
        with shielded(), interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with shielded():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
