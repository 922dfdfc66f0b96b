"""Things by name: one table, one way to add to it, one answer to a name that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ..errors import GraphPruneError
from .suggestions import did_you_mean

_T = TypeVar("_T")


def origin_of(function: Any) -> str:
    """Where a function was defined: the same for one that a notebook defines again."""
    name = str(getattr(function, "__qualname__", type(function).__name__))
    return f"{getattr(function, '__module__', '')}.{name}"


class Registry(Mapping[str, _T], Generic[_T]):
    """Values by name. Adding is by `add`, or by `register` as a decorator of the values themselves.

    `kind`: what the values are, for messages. `taken`: what is said where another function has a name; `{kind}`,
    `{name}` and `{origin}` stand for what they say.

    >>> shapes = Registry("shape")
    >>> @shapes.register("round", "circular")
    ... def circle(): ...
    >>> shapes.find("rond")
    Traceback (most recent call last):
    graphprune.errors.GraphPruneError: unknown shape 'rond'; did you mean 'round'? Known: round, circular
    """

    def __init__(
        self, kind: str, taken: str = "{kind} '{name}' is already registered by {origin}: choose another name"
    ) -> None:
        self.kind = kind
        self._taken = taken
        self._values: dict[str, _T] = {}
        self._origins: dict[str, str] = {}

    def __getitem__(self, name: str) -> _T:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, name: str, value: _T, function: Any = None) -> None:
        """Put `value` there. `function`: what it was made of (default: it is that itself); the same one, defined anew,
        takes its own place. A value that is neither a function nor a class does so where it is equal.

        Raises GraphPruneError where another function has the name.
        """
        origin = origin_of(value if function is None else function)
        known = self._origins.get(name)
        named = function is not None or hasattr(value, "__qualname__")
        if known is not None and (known != origin or not (named or self._values[name] == value)):
            raise GraphPruneError(self._taken.format(kind=self.kind, name=name, origin=known))
        self._values[name], self._origins[name] = value, origin

    def register(self, *names: str) -> Callable[[_T], _T]:
        """A decorator that adds what it decorates under these names, and returns it."""

        def decorate(value: _T) -> _T:
            for name in names:
                self.add(name, value)
            return value

        return decorate

    def remove(self, name: str) -> None:
        """Take a name out again. Raises KeyError where there is none."""
        del self._values[name], self._origins[name]

    def listed(self) -> str:
        """The names, for messages."""
        return ", ".join(self._values)

    def find(self, name: Any) -> _T:
        """The value of that name. Raises GraphPruneError with the nearest name and all others where there is none."""
        if isinstance(name, str) and name in self._values:
            return self._values[name]
        hint = did_you_mean(name, self._values) or "."
        raise GraphPruneError(f"unknown {self.kind} {name!r}{hint} Known: {self.listed()}")
