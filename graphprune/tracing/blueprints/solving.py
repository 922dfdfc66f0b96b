"""Numbers of the code from the sizes that its layers have: what each must be for the code to make these layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..origin import Attribute, Expr, Literal, Operation, evaluate, leaves
from .equations import Equation

Numbers = dict[Attribute, int | float]


@dataclasses.dataclass
class Solution:
    """`numbers`: what is determined. `torn`: numbers that stand for sizes that differ, with these."""

    numbers: Numbers = dataclasses.field(default_factory=dict)
    torn: dict[Attribute, set[int | float]] = dataclasses.field(default_factory=dict)

    def value(self, expr: Expr) -> int | float | None:
        """The value of an expression; None where one of its numbers is not determined."""
        if any(leaf in self.torn or leaf not in self.numbers for leaf in leaves(expr)):
            return None
        try:
            return evaluate(expr, self.numbers.__getitem__)  # type: ignore[arg-type]
        except (ArithmeticError, ValueError, TypeError):
            return None


class System:
    """Equations between expressions and sizes, or other numbers, and what numbers were computed from."""

    def __init__(self) -> None:
        self.equations: list[tuple[Expr, Attribute | None, int]] = []
        self.definitions: dict[Attribute, Expr] = {}

    def add(self, equations: Iterable[Equation], widths: Mapping[object, int]) -> None:
        """`widths`: the size that each width has; equations with others say nothing."""
        for equation in equations:
            if isinstance(equation.right, Attribute):
                self.equations.append((equation.left, equation.right, 0))
            elif equation.right in widths:
                self.equations.append((equation.left, None, widths[equation.right]))

    def solve(self, given: Mapping[Attribute, int | float], idle: Mapping[Attribute, int | float]) -> Solution:
        """First what sizes say directly, from the inside out; then by what numbers were computed from and what they
        are computed into; last from the outside in, and with the numbers `idle` where nothing else is said of them."""
        found = Solution(dict(given))
        steps = (self._sizes, self._computed, self._computing, self._handed_on, lambda s: self._idle(s, idle))
        at = 0
        while at < len(steps):
            at = 0 if _taken(found, steps[at](found), given) else at + 1
        self._check(found, given)
        return found

    def _sizes(self, found: Solution) -> Candidates:
        out: Candidates = defaultdict(set)
        for left, right, size in self.equations:
            target = size if right is None else found.value(right)
            leaf = _unknown(left, found)
            if target is not None and leaf is not None:
                value = inverse(left, leaf, target, found)
                out[leaf].add(value)
        return out

    def _computed(self, found: Solution) -> Candidates:
        out: Candidates = defaultdict(set)
        for leaf, expr in self.definitions.items():
            if leaf not in found.numbers and leaf not in found.torn:
                value = found.value(expr)
                if value is not None:
                    out[leaf].add(value)
        return out

    def _computing(self, found: Solution) -> Candidates:
        out: Candidates = defaultdict(set)
        for leaf, expr in self.definitions.items():
            target, unknown = found.value(leaf), _unknown(expr, found)
            if target is not None and unknown is not None:
                value = inverse(expr, unknown, target, found)
                if value is not None:
                    out[unknown].add(value)
        return out

    def _handed_on(self, found: Solution) -> Candidates:
        out: Candidates = defaultdict(set)
        for left, right, _ in self.equations:
            if right is not None and right not in found.numbers and right not in found.torn:
                value = found.value(left)
                if value is not None:
                    out[right].add(value)
        return out

    def _idle(self, found: Solution, idle: Mapping[Attribute, int | float]) -> Candidates:
        return {n: {v} for n, v in idle.items() if n not in found.numbers and n not in found.torn}

    def _check(self, found: Solution, given: Mapping[Attribute, int | float]) -> None:
        """A number that one size determined, and others contradict, stands for sizes that differ."""
        for left, right, size in self.equations:
            target = size if right is None else found.value(right)
            value = found.value(left)
            if target is not None and value is not None and value != target:
                for leaf in set(leaves(left)) - given.keys():
                    assert isinstance(leaf, Attribute)
                    found.torn.setdefault(leaf, set()).update({found.numbers[leaf]})
                    found.torn[leaf].add(target if left == leaf else value)


Candidates = dict[Attribute, set[int | float | None]]


def _taken(found: Solution, candidates: Candidates, given: Mapping[Attribute, int | float]) -> bool:
    """Take what is clear; whether anything new is known."""
    for leaf, values in candidates.items():
        if len(values) == 1 and None not in values:
            found.numbers[leaf] = next(v for v in values if v is not None)
        else:
            found.torn[leaf] = {v for v in values if v is not None}
    return bool(candidates)


def _unknown(expr: Expr, found: Solution) -> Attribute | None:
    """The only number that is missing, if it is one."""
    missing = {leaf for leaf in leaves(expr) if leaf not in found.numbers}
    if len(missing) != 1:
        return None
    leaf = missing.pop()
    return leaf if isinstance(leaf, Attribute) and leaf not in found.torn else None


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
