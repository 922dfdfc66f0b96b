"""Numbers of the code from the sizes that its layers have: what each must be for the code to make these layers.

The numbers of a network are counted: what stands in one expression is found by its place there (`Term`), and what it is
in the network by `Placed`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..origin import Expr, Literal, Operation, evaluate
from .summary import Summary, Term, attributes

Number = int | float
Numbers = dict[int, Number]
# What is said of numbers, none where something does not fit.
Candidates = dict[int, set[Number | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """What a constructor says, and which number of the network each of its numbers is, by place."""

    summary: Summary
    numbers: Sequence[int]

    def term(self, expr: Expr) -> PlacedTerm:
        """An expression over the numbers that the constructor speaks of."""
        return PlacedTerm.of(self.summary.term(expr), self)


@dataclasses.dataclass(eq=False, slots=True)
class PlacedTerm:
    """An expression over numbers of the network. `alone`: the only one where it is nothing else, or -1."""

    expr: Expr
    leaves: tuple[int, ...]
    alone: int
    placed: Placed

    @classmethod
    def of(cls, term: Term, placed: Placed) -> PlacedTerm:
        numbers = placed.numbers
        if term.alone:
            number = numbers[term.leaves[0]]
            return cls(term.expr, (number,), number, placed)
        return cls(term.expr, tuple([numbers[place] for place in term.leaves]), -1, placed)

    def number(self, leaf: Any) -> int:
        """Which number of the network stands in the expression."""
        return self.placed.numbers[self.placed.summary.places[leaf]]


@dataclasses.dataclass
class Solution:
    """`numbers`: what is determined. `torn`: numbers that stand for sizes that differ, with these."""

    numbers: Numbers = dataclasses.field(default_factory=dict)
    torn: dict[int, set[Number]] = dataclasses.field(default_factory=dict)

    def number(self, leaf: int) -> Number | None:
        """What a number is; None where that is not determined."""
        return None if leaf in self.torn else self.numbers.get(leaf)

    def value(self, term: PlacedTerm) -> Number | None:
        """The value of an expression; None where one of its numbers is not determined."""
        if term.alone >= 0:
            return self.number(term.alone)
        return self._value(term.expr, term) if self._determined(term.leaves) else None

    def part(self, expr: Expr, term: PlacedTerm) -> Number | None:
        """The same of a part of an expression."""
        leaves = [term.number(leaf) for leaf in attributes(expr)]
        return self._value(expr, term) if self._determined(leaves) else None

    def _determined(self, leaves: Iterable[int]) -> bool:
        return all(leaf in self.numbers and leaf not in self.torn for leaf in leaves)

    def _value(self, expr: Expr, term: PlacedTerm) -> Number | None:
        try:
            return evaluate(expr, lambda leaf: self.numbers[term.number(leaf)])
        except (ArithmeticError, ValueError, TypeError):
            return None


@dataclasses.dataclass(eq=False, slots=True)
class Side:
    """An expression, and what it is: `right`, another number, or -1 where it is a size."""

    term: PlacedTerm
    right: int
    size: Number = 0

    def target(self, found: Solution) -> Number | None:
        return self.size if self.right < 0 else found.number(self.right)

    def unknown(self, found: Solution) -> int | None:
        """The only number that is missing, if it is one, of what is not solved."""
        if self.term.alone >= 0:
            return self.term.alone
        missing = {leaf for leaf in self.term.leaves if leaf not in found.numbers}
        leaf = missing.pop() if len(missing) == 1 else None
        return None if leaf in found.torn else leaf

    def solved(self, found: Solution) -> bool:
        """Nothing more can be learned from it."""
        alone = self.term.alone
        if alone >= 0:
            return alone in found.numbers or alone in found.torn
        return all(leaf in found.numbers or leaf in found.torn for leaf in self.term.leaves)


def solve(
    sides: Sequence[Side], definitions: Iterable[Side], given: Mapping[int, Number], idle: Mapping[int, Number]
) -> Solution:
    """First what sizes say directly, from the inside out; then by what numbers were computed from and what they are
    computed into; last from the outside in, and with the numbers `idle` where nothing else is said of them.

    `sides`: expressions that are sizes, or what another constructor was given. `definitions`: what numbers were
    computed from."""
    found = Solution(dict(given))
    open_, computed, computing = list(sides), list(definitions), list(definitions)
    handed_on = [side for side in sides if side.right >= 0]
    steps: tuple[Callable[[], Candidates], ...] = (
        lambda: _inwards(open_, found),
        lambda: _outwards(computed, found),
        lambda: _inwards(computing, found),
        lambda: _outwards(handed_on, found),
        lambda: {n: {v} for n, v in idle.items() if n not in found.numbers and n not in found.torn},
    )
    at = 0
    while at < len(steps):
        at = 0 if _taken(found, steps[at]()) else at + 1
    _check(sides, found, given)
    return found


def _check(sides: Iterable[Side], found: Solution, given: Mapping[int, Number]) -> None:
    """A number that one size determined, and others contradict, stands for sizes that differ."""
    for side in sides:
        target = side.target(found)
        value = None if target is None else found.value(side.term)
        if target is None or value is None or value == target:
            continue
        for leaf in set(side.term.leaves) - given.keys():
            found.torn.setdefault(leaf, {found.numbers[leaf]}).add(target if side.term.alone >= 0 else value)


def _inwards(sides: list[Side], found: Solution) -> Candidates:
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
            value = inverse(side.term, leaf, target, found)
            if value is not None or side.right < 0:
                out[leaf].add(value)
    sides[:] = left
    return out


def _outwards(sides: list[Side], found: Solution) -> Candidates:
    """What expressions say of the numbers that they are."""
    out: Candidates = defaultdict(set)
    left = []
    for side in sides:
        right = side.right
        if right < 0 or right in found.numbers or right in found.torn:
            continue
        left.append(side)
        value = found.value(side.term)
        if value is not None:
            out[right].add(value)
    sides[:] = left
    return out


def _taken(found: Solution, candidates: Candidates) -> bool:
    """Take what is clear; whether anything new is known."""
    for leaf, values in candidates.items():
        if len(values) == 1 and None not in values:
            found.numbers[leaf] = next(v for v in values if v is not None)
        else:
            found.torn[leaf] = {v for v in values if v is not None}
    return bool(candidates)


def inverse(term: PlacedTerm, leaf: int, target: Number, known: Solution) -> Number | None:
    """What the number must be for the expression to be `target`, all else known; None where nothing fits exactly."""
    value = target if term.alone == leaf else _inverse(term.expr, leaf, target, known, term)
    if value is None:
        return None
    value = int(value) if value == int(value) else value
    if term.alone == leaf:
        return value

    def number(at: Any) -> Number:
        place = term.number(at)
        return value if place == leaf else known.numbers[place]

    try:
        again = evaluate(term.expr, number)
    except (ArithmeticError, ValueError, TypeError):
        return None
    return value if again == target else None


def _inverse(expr: Expr, leaf: int, target: Number, known: Solution, term: PlacedTerm) -> Number | None:
    if isinstance(expr, Literal):
        return None
    if not isinstance(expr, Operation):
        return target if term.number(expr) == leaf else None
    if expr.function == "neg":
        return _inverse(expr.args[0], leaf, -target, known, term)
    if len(expr.args) != 2:
        return None
    a, b = expr.args
    left, right = known.part(a, term), known.part(b, term)
    if (left is None) == (right is None):
        return None
    try:
        if right is not None:
            wanted = _without_right(expr.function, target, right)
            return None if wanted is None else _inverse(a, leaf, wanted, known, term)
        assert left is not None
        wanted = _without_left(expr.function, target, left)
    except ArithmeticError:
        return None
    return None if wanted is None else _inverse(b, leaf, wanted, known, term)


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


__all__ = ["Number", "Numbers", "Placed", "PlacedTerm", "Side", "Solution", "solve"]
