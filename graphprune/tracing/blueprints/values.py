"""What code that is read, and not run, computes: numbers with their history, lists, layers that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..origin import Attribute, Expr, Literal, Operation, evaluate, leaves


@dataclasses.dataclass(frozen=True)
class Number:
    """A number and, where it is known, its value."""

    expr: Expr
    value: int | float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Something that is no number and known as it is: a text, a class, a function."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Open:
    """Something that was passed in, or a part of it. `value`: where it is known."""

    leaf: Attribute
    value: Any = None
    known: bool = False

    def part(self, name: str, value: Any = None, known: bool = False) -> Open:
        """One of its attributes or entries."""
        return Open(dataclasses.replace(self.leaf, key=(*self.leaf.key, name)), value, known)


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """A list or tuple. `loose`: what it also has, it is not known where and how often."""

    values: list[Value] = dataclasses.field(default_factory=list)
    loose: list[Value] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What a call returned. `target`: what was called; None where that is not known."""

    target: Any
    name: str
    args: tuple[Value, ...]
    kwargs: dict[str, Value]
    added: Items = dataclasses.field(default_factory=Items)


@dataclasses.dataclass(frozen=True, eq=False)
class Child:
    """A module that the object has."""

    path: str
    module: nn.Module


@dataclasses.dataclass(frozen=True, eq=False)
class Either:
    """One of these; the code does not say which."""

    options: tuple[Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Unknown:
    """Anything."""


Value = Number | Known | Open | Items | Made | Child | Either | Unknown
UNKNOWN = Unknown()


def literal(value: Any) -> Value:
    """A constant of the source."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Number(Literal(value), value)
    if isinstance(value, (tuple, list)):
        return Items([literal(item) for item in value])
    return Known(value)


def either(options: Iterable[Value]) -> Value:
    """One of several, flat, each once."""
    flat: list[Value] = []
    for option in options:
        for one in option.options if isinstance(option, Either) else (option,):
            if not any(one is other or _same(one, other) for other in flat):
                flat.append(one)
    if not flat:
        return UNKNOWN
    return flat[0] if len(flat) == 1 else Either(tuple(flat))


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, Number) and isinstance(other, Number):
        return one.expr == other.expr
    if isinstance(one, Known) and isinstance(other, Known):
        return one.value is other.value
    if isinstance(one, Open) and isinstance(other, Open):
        return one.leaf == other.leaf
    return False


def text_of(value: Value) -> str:
    """Equal for equal values."""
    if isinstance(value, Number):
        return str(value.expr)
    if isinstance(value, Open):
        return f"{value.leaf.module}:{value.leaf}"
    if isinstance(value, Known):
        return repr(value.value)[:60]
    if isinstance(value, (Items, Either)):
        return str([text_of(v) for v in (value.values if isinstance(value, Items) else value.options)])
    if isinstance(value, Made):
        named = (f"{name}={text_of(given)}" for name, given in value.kwargs.items())
        return f"{value.name}({', '.join([*map(text_of, value.args), *named])})"
    return f"?{id(value)}"


def number_of(value: Value, home: str) -> Number | None:
    """The value as a number: itself, what was passed in, or a leaf of its own for what a call or a choice gave. `home`:
    the module whose code it is."""
    if isinstance(value, Number):
        return value
    if isinstance(value, Open):
        plain = value.known and isinstance(value.value, (int, float)) and not isinstance(value.value, bool)
        if value.known and not plain:
            return None
        return Number(value.leaf, value.value if plain else None)
    if isinstance(value, Made) and not (isinstance(value.target, type) and issubclass(value.target, nn.Module)):
        return Number(Attribute(f"{home}()", text_of(value)))
    if isinstance(value, Either) and all(number_of(option, home) for option in value.options):
        return Number(Attribute(f"{home}()", text_of(value)))
    return None


def arithmetic(function: str, *operands: Number) -> Number:
    """`function` of `origin.evaluate` applied."""
    expr = Operation(function, tuple(operand.expr for operand in operands))
    value: int | float | None = None
    if all(operand.value is not None for operand in operands):
        plain = Operation(function, tuple(Literal(operand.value) for operand in operands if operand.value is not None))
        try:
            value = evaluate(plain, lambda leaf: leaf.value)  # type: ignore[union-attr]
        except (ArithmeticError, ValueError, TypeError):
            value = None
    if not any(True for _ in leaves(expr)) and value is not None:
        return Number(Literal(value), value)
    return Number(expr, value)
