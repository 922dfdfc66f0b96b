"""What a constructor says, apart from where its object stands in a network, and remembered for objects that are alike.

Reading code takes much longer than what is done with it, and networks are made of a few classes with a few settings
each. So a constructor is read as if its object were a network by itself, once for all objects that are alike
(`alikeness`). Its numbers are counted, and a network puts its own numbers beside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..origin import Attribute, Expr, leaves
from .alike import Alikeness
from .equations import Equation, equations_of
from .interpreter import Reading, read
from .values import Items, Number, Open, Value, number_of

Key = tuple[int | str, ...]
# Of how many kinds of objects what their constructors say is remembered.
_MOST = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """An expression of which the numbers are counted. `leaves`: their places. `alone`: it is nothing but the first."""

    expr: Expr
    leaves: tuple[int, ...]
    alone: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What a reading says of numbers: see `Reading`. `parts`: those in each attribute, by key. Names are those in an
    object which is a network by itself."""

    values: Mapping[Attribute, int | float]
    definitions: Mapping[Attribute, Expr]
    parts: Mapping[str, Mapping[Key, Expr]]
    equations: tuple[Equation, ...]

    @classmethod
    def of(cls, reading: Reading) -> Summary:
        parts = {name: dict(_parts(value, reading.path)) for name, value in reading.fields.items()}
        given = {name: some for name, some in parts.items() if some}
        return cls(dict(reading.values), dict(reading.definitions), given, equations_of(reading))

    # What follows for all objects that are alike: each number has a place in `leaves`

    @functools.cached_property
    def leaves(self) -> tuple[Attribute, ...]:
        """The numbers that are spoken of, each once."""
        return tuple(dict.fromkeys(self._spoken_of()))

    @functools.cached_property
    def places(self) -> Mapping[Attribute, int]:
        """The place of each number."""
        return {leaf: place for place, leaf in enumerate(self.leaves)}

    def _spoken_of(self) -> Iterator[Attribute]:
        yield from self.values
        for leaf, expr in self.definitions.items():
            yield leaf
            yield from attributes(expr)
        for name, some in self.parts.items():
            for key, part in some.items():
                yield Attribute("", name, key)
                yield from attributes(part)
        for equation in self.equations:
            yield from attributes(equation.left)
            if isinstance(equation.right, Attribute):
                yield equation.right

    @functools.cached_property
    def of_others(self) -> tuple[int, ...]:
        """The attributes, of the object and of those inside, that stand in expressions."""
        parts = [part for some in self.parts.values() for part in some.values()]
        exprs = [*(e.left for e in self.equations), *self.definitions.values(), *parts]
        found = dict.fromkeys(leaf for expr in exprs for leaf in attributes(expr))
        return tuple(self.places[leaf] for leaf in found if not leaf.module.endswith(")"))

    @functools.cached_property
    def known(self) -> tuple[tuple[int, int | float], ...]:
        """`values`, by place."""
        return tuple((self.places[leaf], value) for leaf, value in self.values.items())

    @functools.cached_property
    def kept(self) -> tuple[tuple[str, Key, int], ...]:
        """The attributes that are a number of the code, and its place."""
        return tuple(
            (name, key, self.places[part])
            for name, some in self.parts.items()
            for key, part in some.items()
            if isinstance(part, Attribute)
        )

    @functools.cached_property
    def computed(self) -> tuple[tuple[int, Term], ...]:
        """Numbers and what they were computed from; attributes too, which another module may read."""
        found = [(self.places[leaf], self.term(expr)) for leaf, expr in self.definitions.items()]
        for name, some in self.parts.items():
            for key, part in some.items():
                leaf = Attribute("", name, key)
                if part != leaf:
                    found.append((self.places[leaf], self.term(part)))
        return tuple(found)

    @functools.cached_property
    def sides(self) -> tuple[Term, ...]:
        """The left side of each equation."""
        return tuple(self.term(equation.left) for equation in self.equations)

    def term(self, expr: Expr) -> Term:
        """An expression over the numbers that are spoken of."""
        return Term(expr, tuple(self.places[leaf] for leaf in attributes(expr)), isinstance(expr, Attribute))


def attributes(expr: Expr) -> Iterable[Attribute]:
    """The numbers in an expression, as often as they stand there."""
    return (leaf for leaf in leaves(expr) if isinstance(leaf, Attribute))


_remembered: dict[tuple[int, tuple[str, ...]], Summary] = {}


def summary_of(module: nn.Module, alikeness: Alikeness, methods: tuple[str, ...] = ()) -> Summary:
    """What the constructor of a module and these methods say."""
    key = alikeness.key(module)
    found = None if key is None else _remembered.get((key, methods))
    if found is None:
        found = _said(module, methods)
        if key is not None:
            if len(_remembered) >= _MOST:
                _remembered.clear()
            _remembered[key, methods] = found
    return found


def _said(module: nn.Module, methods: tuple[str, ...]) -> Summary:
    start = read("", module)
    said = Summary.of(start)
    for name in methods:
        made = read("", module, name, start)
        made.fields = {n: v for n, v in made.fields.items() if v is not start.fields.get(n)}
        more = Summary.of(made)
        said = dataclasses.replace(
            said,
            values={**said.values, **more.values},
            definitions={**said.definitions, **more.definitions},
            equations=(*said.equations, *more.equations),
        )
    return said


def below(path: str, module: str) -> str:
    """The name of a part of what is called "" where that is called `path`; "()" and "(name)" are its methods."""
    if not path:
        return module
    return path + module if not module or module.startswith("(") else f"{path}.{module}"


def _parts(value: Value | None, path: str) -> Iterator[tuple[Key, Expr]]:
    """The numbers in an attribute, by key."""
    if isinstance(value, Items):
        for i, item in enumerate(value.values if not value.loose else ()):
            for key, part in _parts(item, path):
                yield (i, *key), part
    elif isinstance(value, Open) and value.known and isinstance(value.value, (list, tuple)):
        for i, item in enumerate(value.value):
            if type(item) is int:
                yield (i,), value.part(str(i)).leaf
    elif value is not None:
        number = number_of(value, path)
        if isinstance(number, Number):
            yield (), number.expr


__all__ = ["Summary", "Term", "attributes", "below", "summary_of"]
