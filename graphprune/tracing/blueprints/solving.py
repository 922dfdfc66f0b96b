"""Numbers of the code from the sizes that its layers have: what each must be for the code to make these layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..origin import Attribute, Expr, Literal, Operation, evaluate, leaves
from .equations import Equation

Numbers = dict[Attribute, int | float]


@dataclasses.dataclass
class Solution:
    """`numbers`: what is determined. `torn`: numbers that stand for sizes that differ, with these."""

    numbers: Numbers = dataclasses.field(default_factory=dict)
    torn: dict[Attribute, set[int | float]] = dataclasses.field(default_factory=dict)

    def number(self, leaf: Attribute) -> int | float | None:
        """What a number is; None where that is not determined."""
        return None if leaf in self.torn else self.numbers.get(leaf)

    def value(self, expr: Expr) -> int | float | None:
        """The value of an expression; None where one of its numbers is not determined."""
        if isinstance(expr, Attribute):
            return self.number(expr)
        if any(leaf in self.torn or leaf not in self.numbers for leaf in leaves(expr)):
            return None
        try:
            return evaluate(expr, self.numbers.__getitem__)  # type: ignore[arg-type]
        except (ArithmeticError, ValueError, TypeError):
            return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """An expression with its numbers, and what it is: a size, or another number."""

    expr: Expr
    leaves: tuple[Attribute, ...]
    right: Attribute | None
    size: int

    @classmethod
    def of(cls, expr: Expr, right: Attribute | None, size: int = 0) -> _Side:
        return cls(expr, _leaves(expr), right, size)

    def target(self, found: Solution) -> int | float | None:
        return self.size if self.right is None else found.number(self.right)

    def unknown(self, found: Solution) -> Attribute | None:
        """The only number that is missing, if it is one."""
        missing = {leaf for leaf in self.leaves if leaf not in found.numbers}
        leaf = missing.pop() if len(missing) == 1 else None
        return None if leaf in found.torn else leaf

    def solved(self, found: Solution) -> bool:
        """Nothing more can be learned from it."""
        return all(leaf in found.numbers or leaf in found.torn for leaf in self.leaves)


class System:
    """Equations between expressions and sizes, or other numbers, and what numbers were computed from."""

    def __init__(
        self, equations: Iterable[Equation], widths: Mapping[Any, int], definitions: Mapping[Attribute, Expr]
    ) -> None:
        """`widths`: the size that each width has; equations with others say nothing."""
        self.sides: list[_Side] = []
        for equation in equations:
            if isinstance(equation.right, Attribute):
                self.sides.append(_Side.of(equation.left, equation.right))
            elif equation.right in widths:
                self.sides.append(_Side.of(equation.left, None, widths[equation.right]))
        self.definitions = [_Side.of(expr, leaf) for leaf, expr in definitions.items()]

    def solve(self, given: Mapping[Attribute, int | float], idle: Mapping[Attribute, int | float]) -> Solution:
        """First what sizes say directly, from the inside out; then by what numbers were computed from and what they
        are computed into; last from the outside in, and with the numbers `idle` where nothing else is said of them."""
        found = Solution(dict(given))
        sides, computed, computing = list(self.sides), list(self.definitions), list(self.definitions)
        handed_on = [side for side in sides if side.right is not None]
        steps: tuple[Callable[[], Candidates], ...] = (
            lambda: _inwards(sides, found),
            lambda: _outwards(computed, found),
            lambda: _inwards(computing, found),
            lambda: _outwards(handed_on, found),
            lambda: {n: {v} for n, v in idle.items() if n not in found.numbers and n not in found.torn},
        )
        at = 0
        while at < len(steps):
            at = 0 if _taken(found, steps[at]()) else at + 1
        self._check(found, given)
        return found

    def _check(self, found: Solution, given: Mapping[Attribute, int | float]) -> None:
        """A number that one size determined, and others contradict, stands for sizes that differ."""
        for side in self.sides:
            target = side.target(found)
            value = None if target is None else found.value(side.expr)
            if value is None or value == target:
                continue
            for leaf in set(side.leaves) - given.keys():
                assert target is not None
                found.torn.setdefault(leaf, {found.numbers[leaf]}).add(target if side.expr == leaf else value)


def _inwards(sides: list[_Side], found: Solution) -> Candidates:
    """What sizes say of the numbers in their expressions."""
    out: Candidates = defaultdict(set)
    left = []
    for side in sides:
        if side.solved(found):
            continue
        left.append(side)
        leaf = side.unknown(found)
        target = side.target(found) if leaf is not None else None
        if leaf is not None and target is not None:
            value = inverse(side.expr, leaf, target, found)
            if value is not None or side.right is None:
                out[leaf].add(value)
    sides[:] = left
    return out


def _outwards(sides: list[_Side], found: Solution) -> Candidates:
    """What expressions say of the numbers that they are."""
    out: Candidates = defaultdict(set)
    left = []
    for side in sides:
        right = side.right
        if right is None or right in found.numbers or right in found.torn:
            continue
        left.append(side)
        value = found.value(side.expr)
        if value is not None:
            out[right].add(value)
    sides[:] = left
    return out


def _leaves(expr: Expr) -> tuple[Attribute, ...]:
    return tuple(leaf for leaf in leaves(expr) if isinstance(leaf, Attribute))


Candidates = dict[Attribute, set[int | float | None]]


def _taken(found: Solution, candidates: Candidates) -> bool:
    """Take what is clear; whether anything new is known."""
    for leaf, values in candidates.items():
        if len(values) == 1 and None not in values:
            found.numbers[leaf] = next(v for v in values if v is not None)
        else:
            found.torn[leaf] = {v for v in values if v is not None}
    return bool(candidates)


def inverse(expr: Expr, leaf: Attribute, target: int | float, known: Solution) -> int | float | None:
    """What `leaf` must be for the expression to be `target`, all else known; None where nothing fits exactly."""
    value = _inverse(expr, leaf, target, known)
    if value is None:
        return None
    value = int(value) if value == int(value) else value
    try:
        again = evaluate(expr, lambda at: value if at == leaf else known.numbers[at])  # type: ignore[index]
    except (ArithmeticError, ValueError, TypeError):
        return None
    return value if again == target else None


def _inverse(expr: Expr, leaf: Attribute, target: int | float, known: Solution) -> int | float | None:
    if expr == leaf:
        return target
    if isinstance(expr, Literal) or not isinstance(expr, Operation):
        return None
    if expr.function == "neg":
        return _inverse(expr.args[0], leaf, -target, known)
    if len(expr.args) != 2:
        return None
    a, b = expr.args
    left, right = known.value(a), known.value(b)
    if (left is None) == (right is None):
        return None
    try:
        if right is not None:
            wanted = _without_right(expr.function, target, right)
            return None if wanted is None else _inverse(a, leaf, wanted, known)
        assert left is not None
        wanted = _without_left(expr.function, target, left)
    except ArithmeticError:
        return None
    return None if wanted is None else _inverse(b, leaf, wanted, known)


def _without_right(function: str, target: int | float, right: int | float) -> int | float | None:
    """x in `x function right == target`."""
    if function == "add":
        return target - right
    if function == "sub":
        return target + right
    if function == "mul":
        return _exact(target, right)
    return target * right if function in ("floordiv", "truediv") else None


def _without_left(function: str, target: int | float, left: int | float) -> int | float | None:
    """x in `left function x == target`."""
    if function == "add":
        return target - left
    if function == "sub":
        return left - target
    if function == "mul":
        return _exact(target, left)
    return _exact(left, target) if function in ("floordiv", "truediv") else None


def _exact(a: int | float, b: int | float) -> int | float:
    whole = isinstance(a, int) and isinstance(b, int) and a % b == 0
    return a // b if whole else a / b


__all__ = ["Numbers", "Solution", "System", "inverse"]
