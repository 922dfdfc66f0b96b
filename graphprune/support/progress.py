"""How far a long call has come: told to a function, or drawn on a terminal.

A public function with the argument `progress` is decorated by `reported`. Whatever works below it says

    with stage("fitting layers", len(layers), "layers") as now:
        for layer in layers:
            now.tell(layer.name)
            ...
            now.advance()

and needs no argument for that: who listens is known to the thread. Stages lie in each other. `watched` is such a stage
for what is looked through. Nobody listens where the user wants nothing or there is no terminal; then a stage costs less
than a microsecond.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TextIO, TypeVar

from ..errors import GraphPruneError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# In seconds: what is over before is not drawn; how often a line is drawn again; how long a held terminal is waited for.
_PATIENCE, _PAUSE, _HELD = 2.0, 0.25, 2.0


@dataclass(frozen=True)
class Progress:
    """How far a call has come; what a function given as `progress=` is called with.

    `stage`: what is being done. `done` of `total` units are finished, `total` is None where nobody knows; `unit`: what
    is counted, such as "layers". `seconds` since the call began. `note`: what is under way, such as a layer's name, or
    empty. `outer`: the same of the stage around this one; None for the call itself.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    seconds: float
    note: str = ""
    outer: Progress | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, the call first."""
        return (*(() if self.outer is None else self.outer.stages), self.stage)

    def __str__(self) -> str:
        count = f" {_count(self.done, self.total, self.unit)}"
        return f"{_time(self.seconds)} {': '.join(self.stages)}{count.rstrip()}{self.note and f', {self.note}'}"


ProgressOption = bool | Callable[[Progress], object] | None
"""Who is told: None for a line on a terminal, or whoever listens to the call around this one; True for the same, also
where nobody listens around; False for nobody; or a function."""


class Stage(Protocol):
    """One stage of a call, while it lasts."""

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""

    def tell(self, note: str) -> None:
        """What is under way now."""


class Stop(BaseException):
    """Carries what the user's function raised through everything that would make another error of it."""

    def __init__(self, error: Exception, listener: _Listener) -> None:
        super().__init__(error)
        self.error, self.listener = error, listener


class _Listener(Protocol):
    def update(self, stage: _Stage, begun: bool = False) -> None:
        """`stage`, the innermost one, has just begun or has come further."""

    def left(self, stage: _Stage) -> None:
        """`stage` is over, and the one around it goes on."""

    def make_way(self) -> None:
        """Something else is about to be printed."""

    def close(self) -> None:
        """The call is over."""


class _Silent:
    """The stage of a call that nobody listens to."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def tell(self, note: str) -> None:
        pass


_SILENT = _Silent()
# The innermost stage that is under way on this thread; None where no call has begun.
_current: ContextVar[_Stage | _Silent | None] = ContextVar("graphprune progress", default=None)


class _Stage:
    """A stage with a listener. It changes on its own thread and is read on the one that draws."""

    def __init__(
        self, name: str, total: int | None, unit: str, listener: _Listener, outer: _Stage | None, still: bool
    ) -> None:
        self.name, self.total, self.unit, self.listener, self.outer = name, total, unit, listener, outer
        self.done, self.note, self.begun = 0, "", time.monotonic()
        self.still: bool = still or (outer is not None and outer.still)

    def __enter__(self) -> _Stage:
        self._token = _current.set(self)
        try:
            self.listener.update(self, begun=True)
        except BaseException:
            _current.reset(self._token)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        self.listener.left(self)

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.listener.update(self)

    def tell(self, note: str) -> None:
        self.note = note
        self.listener.update(self)

    def chain(self) -> list[_Stage]:
        """This stage and those around it, the call first."""
        return [*([] if self.outer is None else self.outer.chain()), self]

    def progress(self) -> Progress:
        outer = None if self.outer is None else self.outer.progress()
        seconds = time.monotonic() - self.chain()[0].begun
        return Progress(self.name, self.done, self.total, self.unit, seconds, self.note, outer)


def stage(name: str, total: int | None = None, unit: str = "", *, still: bool = False) -> _Stage | _Silent:
    """A stage of the call that is under way, to be entered by `with`; see the module's docstring.

    `still`: something is timed inside, so that nothing is drawn but by `advance` and `tell`.
    """
    around = _current.get()
    if not isinstance(around, _Stage):
        return _SILENT
    return _Stage(name, total, unit, around.listener, around, still)


def watched(
    items: Iterable[T], name: str, total: int | None, unit: str, *, still: bool = False
) -> Iterator[T]:
    """The items, each of them told as done when the next one is asked for. What happens between is no part of this
    stage, so that it does not matter when a loop is left."""
    now = stage(name, total, unit, still=still)
    if not isinstance(now, _Stage):
        yield from items
        return
    now.listener.update(now, begun=True)
    try:
        for item in items:
            yield item
            now.advance()
    finally:
        now.listener.left(now)


def make_way() -> None:
    """Take a line that is drawn away for now, as something else is about to be printed."""
    around = _current.get()
    if isinstance(around, _Stage):
        around.listener.make_way()


class _Told:
    """A user's function listens."""

    def __init__(self, function: Callable[[Progress], object]) -> None:
        self._function = function

    def update(self, stage: _Stage, begun: bool = False) -> None:
        token = _current.set(_SILENT)  # calls that the function makes are not part of this one
        try:
            self._function(stage.progress())
        except Exception as error:
            raise Stop(error, self) from error
        finally:
            _current.reset(token)

    def left(self, stage: _Stage) -> None:
        pass

    def make_way(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Screen:
    """Draws a line on a terminal, as long as the call lasts, from a thread of its own."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._stage: _Stage | None = None
        self._begun = self._drawn = time.monotonic()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._line: _Line | None = None
        self._thread = threading.Thread(target=self._watch, name="graphprune progress", daemon=True)
        self._thread.start()

    def update(self, stage: _Stage, begun: bool = False) -> None:
        self._stage = stage
        if stage.still and not begun and time.monotonic() - self._drawn > _PAUSE:
            self._draw()

    def left(self, stage: _Stage) -> None:
        self._stage = stage.outer

    def make_way(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._line is not None:
                self._line.stop()
                self._line = None

    def close(self) -> None:
        self._over.set()
        self._thread.join(_HELD)

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE):
            if self._stage is not None and not self._stage.still:
                self._draw()
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._line is not None:
                self._line.stop()

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._begun < _PATIENCE or self._stage is None:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):  # a terminal that is gone, a name it cannot write
            if self._over.is_set():
                return
            self._drawn = now
            if self._line is None:
                self._line = _Line(self._file)
            self._line.draw(self._stage.chain(), now)


class _Line:
    """A line on a terminal, drawn by `rich`: the call, and the stages that have lasted a while.

    One line, as then what others print meanwhile stays where it is, behind the line or below it.
    """

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[time]}", markup=False, style="progress.elapsed"),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
        )
        # no redirection: sys.stdout may be exchanged by others too, and given back in another order
        self._bar = Progress(
            *columns, console=Console(file=file), transient=True, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, time="", note="")

    def draw(self, chain: list[_Stage], now: float) -> None:
        """These stages, the call first; the bar is of the outermost one that knows how long it is."""
        shown = [chain[0], *(s for s in chain[1:] if now - s.begun >= _PATIENCE)]
        counted = next((s for s in shown if s.total), None)
        self._bar.update(
            self._task,
            description=": ".join(" ".join([s.name, _count(s.done, s.total, s.unit)]).rstrip() for s in shown),
            time=_time(now - chain[0].begun) + ("" if counted is None else _left(counted, now)),
            note=next((s.note for s in reversed(shown) if s.note), ""),
        )
        task = self._bar.tasks[0]
        task.total, task.completed = (None, 0) if counted is None else (counted.total, counted.done)
        self._bar.start()  # the first time
        self._bar.refresh()

    def stop(self) -> None:
        self._bar.stop()


def _left(stage: _Stage, now: float) -> str:
    if stage.total is None or not 0 < stage.done <= stage.total:
        return ""
    return f", {_time((now - stage.begun) * (stage.total - stage.done) / stage.done)} left"


def _count(done: int, total: int | None, unit: str) -> str:
    if total is None and not done:
        return ""
    return f"{done}{'' if total is None else f'/{total}'} {unit}".rstrip()


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _terminal() -> TextIO | None:
    """Standard error, where it is a terminal that lines can be drawn on."""
    file = sys.stderr
    try:
        if file is None or not file.isatty():
            return None
    except (AttributeError, ValueError):  # not a file, or closed
        return None
    from rich.console import Console

    console = Console(file=file)
    return file if console.is_terminal and not console.is_dumb_terminal else None


def check_progress(progress: Any) -> None:
    """Raise GraphPruneError unless this is something that `progress=` may be."""
    if progress is None or isinstance(progress, bool):
        return
    wanted = "progress: expected None, True, False or a function of one argument, a graphprune.Progress"
    if not callable(progress):
        raise GraphPruneError(f"{wanted}; got {type(progress).__name__}")
    try:
        signature = inspect.signature(progress)
    except (TypeError, ValueError):  # some of C have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise GraphPruneError(f"{wanted}; {getattr(progress, '__name__', 'this one')} takes others: {error}") from None


class reporting:
    """While inside, stages are told to `progress` (a `ProgressOption`), as parts of one called `name`."""

    def __init__(self, progress: ProgressOption, name: str) -> None:
        check_progress(progress)
        self._progress, self._name = progress, name
        self._own: _Listener | None = None

    def __enter__(self) -> Stage:
        around = _current.get()
        self._token: Token[Any] = _current.set(around)  # whatever is left behind inside is forgotten with it
        try:
            outer = around if isinstance(around, _Stage) else None
            listener = self._listener(around)
            if listener is None:
                _current.set(_SILENT)
                return _SILENT
            if self._own is not None:
                outer = None
            return _Stage(self._name, None, "", listener, outer, False).__enter__()
        except BaseException:
            self._end()
            raise

    def _listener(self, around: _Stage | _Silent | None) -> _Listener | None:
        if callable(self._progress):
            self._own = _Told(self._progress)
            return self._own
        if self._progress is False or (self._progress is None and around is _SILENT):
            return None
        if isinstance(around, _Stage):
            return around.listener
        file = _terminal()
        if file is not None:
            self._own = _Screen(file)
        return self._own

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        _current.reset(self._token)
        if self._own is not None:
            self._own.close()

    def stopped_by(self, stop: Stop) -> bool:
        """Whether it is the function of this call that has stopped it."""
        return stop.listener is self._own


def reported(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a public function with the keyword argument `progress`: who that names is told of the stages inside, as parts
    of one called `name`. What a user's function raises ends the call and comes out as it is."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def told(*args: P.args, **kwargs: P.kwargs) -> R:
            wanted: Any = kwargs.get("progress")
            listening = reporting(wanted, name)
            try:
                with listening:
                    return function(*args, **kwargs)
            except Stop as stop:
                if not listening.stopped_by(stop):
                    raise
                error = stop.error
            raise error

        return told

    return decorated
