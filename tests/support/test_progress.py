"""Progress of long calls: what a function is told, that it can stop a call, and what a terminal shows."""

from __future__ import annotations

import io
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import graphprune
from graphprune.support import progress as module
from graphprune.support.progress import Progress, ProgressOption, reported, stage, watched
from graphprune.support.warning import warn


@reported("counting")
def work(*, progress: ProgressOption = None, inside: Callable[[], object] = lambda: None) -> str:
    """Two stages, one inside the other."""
    with stage("rows", 2, "rows") as rows:
        for name in ("a", "b"):
            rows.tell(name)
            with stage("cells", unit="cells") as cells:
                cells.advance(3)
                inside()
            rows.advance()
    return "done"


def seen(**options: Any) -> list[tuple[tuple[str, ...], int, int | None, str, str]]:
    found: list[Progress] = []
    assert work(progress=found.append, **options) == "done"
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found))
    return [(p.stages, p.done, p.total, p.unit, p.note) for p in found]


def test_a_function_is_told_of_every_stage_in_order() -> None:
    outer, inner = ("counting", "rows"), ("counting", "rows", "cells")
    want: list[Any] = [(("counting",), 0, None, "", ""), (outer, 0, 2, "rows", "")]
    for done, name in enumerate("ab"):
        want += [
            (outer, done, 2, "rows", name),
            (inner, 0, None, "cells", ""),
            (inner, 3, None, "cells", ""),
            (outer, done + 1, 2, "rows", name),
        ]
    assert seen() == want


def test_what_lies_around_a_stage_is_told_too() -> None:
    found: list[Progress] = []
    work(progress=found.append)
    cells = [p for p in found if p.stage == "cells"]
    assert [(p.outer.note, p.outer.done, p.outer.total) for p in cells if p.outer] == [
        ("a", 0, 2), ("a", 0, 2), ("b", 1, 2), ("b", 1, 2)
    ]  # fmt: skip
    assert str(cells[-1]).endswith("counting: rows: cells 3 cells")


def test_calls_inside_are_stages_unless_told_otherwise() -> None:
    inner = ("counting", "rows", "cells", "counting")
    assert any(stages[:4] == inner for stages, *_ in seen(inside=work))
    assert not any(stages[:4] == inner for stages, *_ in seen(inside=lambda: work(progress=False)))
    own: list[Progress] = []
    outside = seen(inside=lambda: work(progress=own.append))
    assert outside == seen() and own[0].stages == ("counting",)
    silent: list[Progress] = []
    work(progress=False, inside=lambda: work(progress=silent.append))
    assert silent
    work(progress=False, inside=work)
    assert module._current.get() is None


def test_a_function_may_call_what_it_is_told_of() -> None:
    depth: list[int] = []

    def listener(_: Progress) -> None:
        depth.append(len(depth))
        work()  # with nobody who listens, and not this function again

    work(progress=listener)
    assert len(depth) == len(seen())


@pytest.mark.parametrize("error", [ValueError("enough"), KeyboardInterrupt(), graphprune.GraphPruneError("no")])
def test_what_a_function_raises_comes_out_as_it_is(error: BaseException) -> None:
    def swallowing() -> None:
        try:
            with stage("deep") as now:
                now.advance()
        except Exception as inner:
            raise AssertionError("made another error of it") from inner

    def listener(found: Progress) -> None:
        if found.stage == "deep":
            raise error

    with pytest.raises(type(error)) as raised:
        work(progress=listener, inside=lambda: work(inside=swallowing))
    assert raised.value is error and error.__context__ is None
    assert module._current.get() is None and seen()


def test_an_error_in_the_first_call_leaves_nothing_behind() -> None:
    def listener(_: Progress) -> None:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        work(progress=listener)
    assert module._current.get() is None


@pytest.mark.parametrize("wrong", [1, 0.5, "yes", [], lambda: None, lambda a, b: None])
def test_other_things_are_refused(wrong: Any) -> None:
    with pytest.raises(graphprune.GraphPruneError, match=r"^progress: expected None, True, False or a function of one"):
        work(progress=wrong)


def test_threads_do_not_hear_each_other() -> None:
    here: list[Progress] = []
    there: list[Progress] = []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: (work(), work(progress=there.append)))
        thread.start()
        thread.join()

    work(progress=here.append, inside=elsewhere)
    assert len(here) == len(seen()) and len(there) == 2 * len(seen())


class Terminal(io.StringIO):
    """A terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    found = Terminal()
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=found))  # pytest exchanges that of sys
    yield found
    assert capsys.readouterr().out == ""
    assert not any(t.name == "graphprune progress" for t in threading.enumerate())


def drawn_until(terminal: Terminal, text: str) -> Callable[[], None]:
    """Waits, for as long as a test may, until something is drawn; an end of the wait is no failure by itself."""

    def wait() -> None:
        for _ in range(400):
            if text in plain(terminal):
                return
            threading.Event().wait(0.01)

    return wait


def plain(terminal: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


@pytest.mark.parametrize("progress", [None, True])
def test_a_terminal_gets_a_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, progress: ProgressOption
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    wanted = [f"counting: rows {done}/2 rows: cells 3 cells" for done in range(2)]
    waits = iter(drawn_until(terminal, text) for text in wanted)
    work(progress=progress, inside=lambda: next(waits)())
    assert all(text in plain(terminal) for text in wanted) and " left" in plain(terminal)
    assert plain(terminal).count("\n") == 1 and terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # taken away again


def test_what_is_over_soon_is_not_drawn(terminal: Terminal) -> None:
    work()
    work(progress=True)
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_where_that_is_not_wanted_or_there_is_no_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    names: list[str] = []

    def wait() -> None:
        threading.Event().wait(0.02)
        names.extend(thread.name for thread in threading.enumerate())

    work(progress=False, inside=wait)
    work(progress=[].append, inside=wait)
    monkeypatch.setenv("TERM", "dumb")
    work(progress=True, inside=wait)
    monkeypatch.setenv("TERM", "xterm")
    for other in (io.StringIO(), None):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=other))
        work(progress=True, inside=wait)
        assert other is None or other.getvalue() == ""
    assert terminal.getvalue() == "" and "graphprune progress" not in names


def test_nothing_is_drawn_behind_the_back_of_what_is_timed(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.001)

    @reported("timing")
    def timed() -> None:
        with stage("rounds", 2, "rounds", still=True) as now, stage("calls", 2, "calls") as calls:
            before = terminal.getvalue()
            threading.Event().wait(0.05)
            assert terminal.getvalue() == before
            now.advance()
            assert "rounds 1/2 rounds" in plain(terminal)
            calls.advance()

    timed()


def test_a_terminal_that_is_gone_stops_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    work(inside=lambda: (terminal.close(), threading.Event().wait(0.02)))


def test_a_warning_stands_on_a_line_of_its_own(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    places: list[str] = []

    def warning() -> None:
        drawn_until(terminal, "rows")()
        with pytest.warns(graphprune.GraphPruneWarning):
            warn("look here")
        places.append(terminal.getvalue())
        again = len(terminal.getvalue())
        for _ in range(400):
            if "rows" in terminal.getvalue()[again:]:
                return
            threading.Event().wait(0.01)

    work(inside=warning)
    assert all(place.endswith("\x1b[1A\x1b[2K") for place in places) and len(places) == 2
    assert "rows" in terminal.getvalue()[len(places[0]) :]


def test_watched_items_are_told_and_may_be_left() -> None:
    found: list[Progress] = []

    @reported("looking")
    def looking(*, progress: ProgressOption = None) -> list[str]:
        some = []
        for item in watched("abc", "letters", 3, "letters"):
            some.append(item)
            if item == "b":
                break
        with stage("after"):
            return some

    assert looking() == looking(progress=found.append) == ["a", "b"]
    assert [(p.stage, p.done) for p in found] == [("looking", 0), ("letters", 0), ("letters", 1), ("after", 0)]
    assert found[-1].stages == ("looking", "after")


def test_names_are_no_markup(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PAUSE", 0.01)

    @reported("naming")
    def named() -> None:
        with stage("[bold]layers") as now:
            now.tell("first.weight[0]")
            drawn_until(terminal, "[0]")()

    named()
    assert "[bold]layers" in plain(terminal) and "first.weight[0]" in plain(terminal)
