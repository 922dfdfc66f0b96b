"""Functions of torch and of Python that do something else while a model is recorded, on the thread that records it.

A replacement is made where the first recording of the process needs it and gone when the last one has ended. On other
threads it does what it replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..support.interrupts import shielded

_lock = threading.Lock()
_places: dict[tuple[int, str], _Place] = {}
_MISSING = object()


class _Place:
    """An attribute of a module or class with something else in it. `original`: what lies there otherwise."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.stored = vars(owner).get(name, _MISSING)
        self.of_class = isinstance(self.stored, (classmethod, types.ClassMethodDescriptorType))
        self.original: Any = self._called_with_class if self.of_class else getattr(owner, name, None)
        self.users = 0
        self.local = threading.local()

    def _called_with_class(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        return self.stored.__get__(None, kind)(*args, **kwargs)

    @property
    def stack(self) -> list[Any]:
        """The replacements of the running thread."""
        found: list[Any] | None = getattr(self.local, "stack", None)
        if found is None:
            found = self.local.stack = []
        return found

    def fill(self, whole: bool, replacement: Any) -> None:
        if whole:
            setattr(self.owner, self.name, replacement)
            return
        local, original = self.local, self.original

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            stack = getattr(local, "stack", None)
            return (stack[-1] if stack else original)(*args, **kwargs)

        dispatch.__name__ = dispatch.__qualname__ = self.name
        dispatch.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(self.owner, self.name, classmethod(dispatch) if self.of_class else dispatch)

    def empty(self) -> None:
        if self.stored is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.stored)


@dataclasses.dataclass(frozen=True)
class Patch:
    """`make(f)` is to stand where the function `f` does, `owner.name`; of a class method, `f` takes the class first.

    `whole`: a class, or what else is no function; it must behave like what it replaces by itself, as other threads see
    it too.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    whole: bool = False

    def enter(self) -> _Place:
        """Put it in place; the lock is held."""
        key = id(self.owner), self.name
        place = _places.get(key) or _places.setdefault(key, _Place(self.owner, self.name))
        stack = place.stack
        replacement = self.make(stack[-1] if stack else place.original)
        if not place.users:
            place.fill(self.whole, replacement)
        place.users += 1
        stack.append(replacement)
        return place


def _leave(place: _Place) -> None:
    place.stack.pop()
    place.users -= 1
    if not place.users:
        place.empty()
        del _places[id(place.owner), place.name]


@contextlib.contextmanager
def patched_together(patches: Iterable[Patch]) -> Iterator[None]:
    """While inside, and on this thread, these are in place."""
    with shielded() as shield:
        entered: list[_Place] = []
        try:
            with _lock:
                for patch in patches:
                    entered.append(patch.enter())
            with shield.lifted():
                yield
        finally:
            with _lock:
                for place in reversed(entered):
                    _leave(place)


def patched(
    owner: Any, name: str, make: Callable[[Any], Any], *, whole: bool = False
) -> contextlib.AbstractContextManager[None]:
    """One patch in place."""
    return patched_together((Patch(owner, name, make, whole),))
