"""Numbers that remember where they came from.

While a model is recorded, the integers it reads - its own attributes and the sizes of tensors - are `TracedInt`s. They
are ordinary integers to the model, but every value computed from them carries an `Expr`: an arithmetic expression over
attributes, tensor sizes and literals. After pruning the same expression, evaluated with the new sizes, tells whether
the user's code still computes the right number.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.fx

from .memoised import serves_a_cache

Number = int | float


@dataclasses.dataclass(frozen=True)
class Literal:
    """A number written in the source, or one whose history was lost (which is treated the same: it cannot change)."""

    value: Number

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, `getattr(model.get_submodule(module), name)[key[0]][key[1]]...`, and its value
    in the recorded run."""

    module: str
    name: str
    key: tuple[int | str, ...] = ()
    value: int = 0

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path + "".join(f"[{k!r}]" for k in self.key)


@dataclasses.dataclass(frozen=True)
class TensorSize:
    """The size of a recorded tensor along one axis."""

    node: torch.fx.Node
    axis: int

    def __str__(self) -> str:
        return f"{self.node.name}.shape[{self.axis}]"


@dataclasses.dataclass(frozen=True)
class Operation:
    """Arithmetic on other expressions."""

    function: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        symbol = _SYMBOLS.get(self.function)
        if symbol and len(self.args) == 2:
            return f"({self.args[0]} {symbol} {self.args[1]})"
        return f"{self.function}({', '.join(map(str, self.args))})"


Expr = Literal | Attribute | TensorSize | Operation

_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "sqrt": math.sqrt,
}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**"}


def leaves(expr: Expr) -> Iterator[Attribute | TensorSize]:
    """The attributes and tensor sizes in `expr`, repeated as often as they occur."""
    if isinstance(expr, Operation):
        for arg in expr.args:
            yield from leaves(arg)
    elif not isinstance(expr, Literal):
        yield expr


def recorded_value(leaf: Attribute | TensorSize) -> int:
    """What a leaf was in the recorded run."""
    return leaf.value if isinstance(leaf, Attribute) else int(leaf.node.meta["val"].shape[leaf.axis])


def evaluate(expr: Expr, lookup: Callable[[Attribute | TensorSize], Number]) -> Number:
    """The value of `expr` when every leaf has the value `lookup(leaf)`. Raises ArithmeticError where Python would."""
    if isinstance(expr, Literal):
        return expr.value
    if isinstance(expr, Operation):
        return _FUNCTIONS[expr.function](*(evaluate(arg, lookup) for arg in expr.args))
    return lookup(expr)


class Session:
    """One recording: the numbers that it handed out, which are plain ones on other threads, and once it is over.

    `guard`: told of comparisons. A number may outlive the recording, in a cache of the user's code for example; it must
    not bring the sizes of another run into the next one.
    """

    def __init__(self, guard: Callable[[str, Expr, Expr, bool], None] | None = None) -> None:
        self.guard = guard
        self.thread = threading.get_ident()
        self.numbers: list[TracedInt | TracedFloat] = []

    def whole(self, value: int, origin: Expr) -> TracedInt:
        """`value` with this origin."""
        number = TracedInt(value)
        self.note(number, origin)
        return number

    def real(self, value: float, origin: Expr) -> TracedFloat:
        """`value` with this origin."""
        number = TracedFloat(value)
        self.note(number, origin)
        return number

    def note(self, number: TracedInt | TracedFloat, origin: Expr) -> None:
        """The number has this origin, as long as the recording lasts."""
        number.origin, number.session = origin, self
        self.numbers.append(number)

    def close(self) -> None:
        """All numbers are plain from here on."""
        self.guard = None
        for number in self.numbers:
            number.__dict__.clear()
        self.numbers.clear()


def _live(session: Session | None) -> Session | None:
    return session if session is not None and session.thread == threading.get_ident() else None


class TracedInt(int):
    """An int with an origin. Arithmetic with numbers yields traced numbers; comparisons are reported as guards."""

    origin: Expr
    session: Session | None = None

    @property
    def live(self) -> Session | None:
        """The recording, if it is one of the running thread."""
        return _live(self.session)

    # Copies and pickles of a model made while it is being recorded must hold plain numbers.
    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int.__int__(self),))

    def __copy__(self) -> int:
        return int.__int__(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int.__int__(self)

    def __hash__(self) -> int:
        if self.live is not None and serves_a_cache(sys._getframe(1)):
            return id(self)  # what is computed from this number must not be found again, nor found instead of it
        return int.__hash__(self)


class TracedFloat(float):
    """A float with an origin, such as `head_dim ** -0.5`."""

    origin: Expr
    session: Session | None = None

    @property
    def live(self) -> Session | None:
        """The recording, if it is one of the running thread."""
        return _live(self.session)

    def __reduce__(self) -> tuple[Any, ...]:
        return (float, (float.__float__(self),))

    def __copy__(self) -> float:
        return float.__float__(self)

    def __deepcopy__(self, memo: Any) -> float:
        return float.__float__(self)

    def __hash__(self) -> int:
        if self.live is not None and serves_a_cache(sys._getframe(1)):
            return id(self)
        return float.__hash__(self)


def origin_of(value: Any) -> Expr:
    """The expression behind a number; plain numbers are literals."""
    return value.origin if is_traced(value) else Literal(plain(value))


TRACED = (TracedInt, TracedFloat)


def is_traced(value: Any) -> bool:
    """A number with a history."""
    return isinstance(value, TRACED) and value.live is not None


def plain(value: Any) -> Any:
    """The value without its history."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


_sqrt = math.sqrt  # `traced_sqrt` stands in for it while a model is recorded


def traced_sqrt(value: Any) -> float:
    """`math.sqrt` that keeps the history."""
    result: float = _sqrt(plain(value))
    if not is_traced(value):
        return result
    traced: float = _wrap(result, Operation("sqrt", (value.origin,)), value.session)
    return traced


class _FloatLike(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, float)

    def __call__(cls, value: Any = 0.0) -> float:
        if not is_traced(value):
            return float(plain(value))
        traced: float = _wrap(float(plain(value)), value.origin, value.session)
        return traced


class traced_float(metaclass=_FloatLike):
    """Stands in for `float` where torch converts a size (`1.0 / float(E)` in multi-head attention)."""


def _wrap(result: Any, expr: Expr, session: Any) -> Any:
    if type(result) is int:
        return session.whole(result, expr)
    if type(result) is float:
        return session.real(result, expr)
    return result


def _told(self: Any, comparison: str, other: Any, outcome: bool) -> None:
    session = self.live
    if session is not None and session.guard is not None:
        session.guard(comparison, self.origin, other, outcome)


def _lossy(self: Any) -> None:
    """The number leaves our sight as a plain one: from here on it must not change."""
    _told(self, "same", Literal(plain(self)), True)


def _to_float(self: Any) -> float:
    _lossy(self)
    return float(plain(self))


def _to_int(self: Any) -> int:
    _lossy(self)
    return int(plain(self))


def _truth(self: Any) -> bool:
    """`if width % heads:` asks whether the number is zero."""
    result = bool(plain(self))
    _told(self, "ne", Literal(0), result)
    return result


def _array_ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    for value in inputs:
        if is_traced(value):
            _lossy(value)
    return getattr(ufunc, method)(*map(plain, inputs), **kwargs)


def _negative(self: Any) -> Any:
    result = -plain(self)
    return result if self.live is None else _wrap(result, Operation("neg", (self.origin,)), self.session)


def _install(cls: type, base: type) -> None:
    def binary(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
        dunder = f"__{'r' if reflected else ''}{name}__"
        method, as_float = getattr(base, dunder), getattr(float, dunder)

        def call(self: Any, other: Any) -> Any:
            # int.__pow__(2, 0.5) defers to float, which would forget the history
            result = as_float(float(plain(self)), other) if isinstance(other, float) else method(self, other)
            if result is NotImplemented or not isinstance(other, (int, float)):
                return result
            session = self.live or getattr(other, "live", None)
            if session is None:
                return plain(result)
            mine, theirs = origin_of(self), origin_of(other)
            return _wrap(plain(result), Operation(name, (theirs, mine) if reflected else (mine, theirs)), session)

        return call

    def compare(name: str) -> Callable[[Any, Any], Any]:
        method = getattr(base, f"__{name}__")

        def call(self: Any, other: Any) -> Any:
            result = method(self, other)
            if result is not NotImplemented and isinstance(other, (int, float)):
                _told(self, name, origin_of(other), result)
            return result

        return call

    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
        setattr(cls, f"__{name}__", binary(name, False))
        setattr(cls, f"__r{name}__", binary(name, True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(cls, f"__{name}__", compare(name))
    special: dict[str, Callable[..., Any]] = {
        "__neg__": _negative,
        "__pos__": lambda self: self,
        "__divmod__": lambda self, other: (self // other, self % other),
        "__bool__": _truth,
        "__float__": _to_float,
        "__int__": _to_int,
        "__trunc__": _to_int,
        "__array_ufunc__": _array_ufunc,
    }
    if base is int:
        special["__round__"] = lambda self, ndigits=None: self
    for name, method in special.items():
        setattr(cls, name, method)


_install(TracedInt, int)
_install(TracedFloat, float)
