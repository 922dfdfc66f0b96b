"""What a constructor says, apart from where its object stands in a network, and remembered for objects that are alike.

Reading code takes much longer than what is done with it, and networks are made of a few classes with a few settings
each. So a constructor is read as if its object were a network by itself, once for all objects that are alike
(`alikeness`), and names are put in front afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from ..origin import Attribute, Expr, Operation
from .alike import Alikeness
from .equations import Equation, Width, equations_of
from .interpreter import Reading, read
from .values import Items, Number, Open, Value, number_of

Key = tuple[int | str, ...]
# Of how many kinds of objects what their constructors say is remembered.
_MOST = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """What a reading says of numbers: see `Reading`. `parts`: those in each attribute, by key."""

    values: Mapping[Attribute, int | float]
    definitions: Mapping[Attribute, Expr]
    parts: Mapping[str, tuple[tuple[Key, Expr], ...]]
    equations: tuple[Equation, ...]

    @classmethod
    def of(cls, reading: Reading) -> Summary:
        parts = {name: tuple(_parts(value, reading.path)) for name, value in reading.fields.items()}
        given = {name: some for name, some in parts.items() if some}
        return cls(dict(reading.values), dict(reading.definitions), given, equations_of(reading))

    def at(self, path: str) -> Summary:
        """That of an object which is called `path` in its network, and not ""."""
        if not path:
            return self
        moved = _moved(path)

        def attribute(leaf: Attribute) -> Attribute:
            found = moved(leaf)
            assert isinstance(found, Attribute)
            return found

        def right(side: Width | Attribute) -> Width | Attribute:
            if isinstance(side, Width):
                return Width(_below(path, side.module), side.name, side.axis)
            return attribute(side)

        return Summary(
            {attribute(leaf): value for leaf, value in self.values.items()},
            {attribute(leaf): moved(expr) for leaf, expr in self.definitions.items()},
            {name: tuple((key, moved(expr)) for key, expr in some) for name, some in self.parts.items()},
            tuple(Equation(moved(equation.left), right(equation.right)) for equation in self.equations),
        )


_remembered: dict[tuple[str, tuple[str, ...]], Summary] = {}


def summary_of(path: str, module: nn.Module, alikeness: Alikeness, methods: tuple[str, ...] = ()) -> Summary:
    """What the constructor of a module and these methods say, whose name in the network is `path`."""
    key = alikeness.key(module)
    found = None if key is None else _remembered.get((key, methods))
    if found is None:
        found = _said(module, methods)
        if key is not None:
            if len(_remembered) >= _MOST:
                _remembered.clear()
            _remembered[key, methods] = found
    return found.at(path)


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


def _below(path: str, module: str) -> str:
    """The name of a part of what is called "" where that is called `path`; "()" and "(name)" are its methods."""
    return path + module if not module or module.startswith("(") else f"{path}.{module}"


def _moved(path: str) -> Callable[[Expr], Expr]:
    known: dict[Attribute, Attribute] = {}

    def moved(expr: Expr) -> Expr:
        if isinstance(expr, Attribute):
            found = known.get(expr)
            if found is None:
                found = known[expr] = Attribute(_below(path, expr.module), expr.name, expr.key, expr.value)
            return found
        if isinstance(expr, Operation):
            return Operation(expr.function, tuple(map(moved, expr.args)))
        return expr

    return moved


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


__all__ = ["Summary", "summary_of"]
