"""Do the sizes in the user's code still come out right? Solve for attributes, or say what blocks.

Input: which positions are to go. Output: the module attributes that must change to make every recorded size right, and
the sizes that cannot be made right (`Conflict`), each with the axes that would have to stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from ..errors import GraphPruneError
from ..tracing.origin import Attribute, Expr, Literal, Operation, TensorSize, evaluate, leaves, recorded_value
from ..tracing.recorder import Guard, Source
from .analysis import Analysis
from .effects import SizeSite
from .state import AxisMap, Mask, Vector

# How far a width may be moved to satisfy a comparison such as `width % heads == 0`
_NEARBY = 65
COMPARE = {
    "same": lambda a, b: a == b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Conflict:
    """A number that does not come out right.

    `wanted` is the count of surviving indices that would satisfy it; `instead` another axis whose count would.
    `possible`: all counts that would, ascending, where a comparison can be asked for every count alone; else None.
    """

    text: str
    node: fx.Node | None
    axis_map: AxisMap
    length: int
    survivors: int
    wanted: int | None
    source: Source | None = None
    instead: Conflict | None = None
    possible: Vector | None = None


@dataclasses.dataclass
class Resolution:
    """Attributes that must change, and the sizes that cannot be made right. `read`: what all attributes that a size
    was read from must be, changed or not."""

    attributes: dict[Attribute, int]
    conflicts: list[Conflict]
    read: dict[Attribute, int] = dataclasses.field(default_factory=dict)


def gone_on_axis(analysis: Analysis, axis_map: AxisMap, length: int, gone: Mask) -> Mask:
    """Which indices of an axis disappear; `gone` is a mask over components."""
    mask = np.zeros(length, bool)
    for d, v in axis_map.items():
        labels = analysis.label[analysis.dims.offset[d] + v]
        mask |= gone[labels] & (v >= 0)
    return mask


def gone_with(analysis: Analysis, removed: Mapping[str, Mapping[int, Sequence[int]]]) -> Mask:
    """Which components go with indices of parameters (name -> axis -> indices): those whose every index on some of
    these axes goes. Raises GraphPruneError for an axis that has no coordinates."""
    positions = []
    for name, axes in removed.items():
        for axis, indices in axes.items():
            axis_map = analysis.dims.roots.get((name, axis))
            if axis_map is None:
                raise GraphPruneError(f"the plan removes from axis {axis} of {name}, which is no channel axis")
            length = analysis.trace.parameters[name].meta["val"].shape[axis]
            lost = np.zeros(length, bool)
            lost[list(indices)] = True
            for dim, vector in axis_map.items():
                here = vector >= 0
                total = np.bincount(vector[here], minlength=analysis.dims.size[dim])
                gone = np.bincount(vector[here & lost], minlength=analysis.dims.size[dim])
                positions.append(analysis.dims.offset[dim] + np.nonzero((total > 0) & (total == gone))[0])
    return analysis.components_of(positions)


class SizeSolver:
    """Evaluates the recorded sizes for one choice of removed components."""

    def __init__(self, analysis: Analysis, gone: Mask) -> None:
        self.analysis = analysis
        self.gone = gone
        self.attributes: dict[Attribute, int] = {}
        self.demanded_by: dict[Attribute, list[SizeSite]] = {}
        self._sizes: dict[TensorSize, int] = {}

    def survivors(self, site: SizeSite) -> int:
        kept = ~gone_on_axis(self.analysis, site.axis_map, site.length, self.gone)
        return int(kept[slice(*site.span)].sum()) if site.span else int(kept.sum())

    def value(self, leaf: Attribute | TensorSize) -> int:
        """The value of a leaf after pruning."""
        if isinstance(leaf, Attribute):
            return self.attributes.get(leaf, leaf.value)
        if leaf not in self._sizes:
            state = self.analysis.state(leaf.node)
            length = leaf.node.meta["val"].shape[leaf.axis]
            mask = gone_on_axis(self.analysis, state.axis(leaf.axis), length, self.gone)
            self._sizes[leaf] = length - int(mask.sum())
        return self._sizes[leaf]

    def evaluate(self, expr: Expr) -> float | None:
        try:
            return evaluate(expr, self.value)
        except ArithmeticError:
            return None

    def resolve(self) -> Resolution:
        rewritten = self.analysis.rewritten.nodes
        free = [s for s in self.analysis.sites if s.node not in rewritten]
        sites = [s for s in free if s.length]
        watched = [s for s in free if not s.length]
        guards = self.analysis.guards
        conflicts: list[Conflict] = []
        compound = []
        for site in sites:
            if isinstance(site.expr, Attribute):
                self._demand(site.expr, self.survivors(site), site, conflicts)
            else:
                compound.append(site)
        self._equalities(guards)
        several = [site for site in compound if not self._check(site, 1, conflicts)]
        for site in several:
            self._check(site, 2, conflicts)
        if several:  # an attribute chosen for one size may not suit another that came out right before
            blamed = {conflict.node for conflict in conflicts}
            for site in compound:
                if site.node not in blamed:
                    self._check(site, 0, conflicts)
        for site in watched:
            if self.evaluate(site.expr) != evaluate(site.expr, recorded_value):
                conflicts += self.blame(site.expr, site.what, site.node)
        conflicts += self._check_guards(guards)
        changed = {a: v for a, v in self.attributes.items() if v != a.value}
        return Resolution(changed, conflicts, self.attributes)

    def _demand(self, attribute: Attribute, value: int, site: SizeSite, conflicts: list[Conflict]) -> None:
        known = self.attributes.get(attribute)
        self.demanded_by.setdefault(attribute, []).append(site)
        if known is None:
            self.attributes[attribute] = value
        elif known != value:
            text = f"{attribute} would have to be {known} and {value} at once"
            for other in self.demanded_by[attribute]:
                if other.axis_map:
                    conflicts.append(
                        Conflict(text, other.node, other.axis_map, other.length, self.survivors(other), None)
                    )

    def _equalities(self, guards: Iterable[Guard]) -> None:
        """`assert x.shape[1] == self.channels`: an attribute that only such a comparison reads follows the size."""
        for guard in guards:
            if (guard.comparison, guard.outcome) not in (("eq", True), ("ne", False)):
                continue
            for mine, theirs in ((guard.left, guard.right), (guard.right, guard.left)):
                if isinstance(mine, Attribute) and mine not in self.attributes and not isinstance(theirs, Literal):
                    value = self.evaluate(theirs)
                    if value is not None and int(value) == value:
                        self.attributes[mine] = int(value)
                    break

    def _check(self, site: SizeSite, most: int, conflicts: list[Conflict]) -> bool:
        """Make a computed size right by one attribute that nothing else decides, or note the conflict.

        Of several such attributes, the one with the largest value (a width, not a number of parts) that can make it
        right. False where there are several and `most` is 1: they are left for later, when others are known.
        """
        wanted = self.survivors(site)
        value = self.evaluate(site.expr)
        if value == wanted:
            return True
        unknown = {leaf for leaf in leaves(site.expr) if isinstance(leaf, Attribute) and leaf not in self.attributes}
        if most == 1 and len(unknown) > 1:
            return False
        for leaf in sorted(unknown, key=lambda leaf: (-leaf.value, str(leaf))) if most else ():
            solved = _solve(site.expr, leaf, wanted, self.value)
            if solved is not None:
                self.attributes[leaf] = solved
                self.demanded_by.setdefault(leaf, []).append(site)
                return True
        text = f"{site.what}, {describe(site.expr)}, would be {value:g}" if value is not None else site.what
        text += f" where {wanted} are left"
        if site.axis_map and not self.analysis.frozen(positions_of(self.analysis, site.axis_map)).all():
            count = int(value) if value is not None and value == int(value) else None
            instead = self._other_side(site, text, wanted)
            conflicts.append(Conflict(text, site.node, site.axis_map, site.length, wanted, count, instead=instead))
        else:
            conflicts.extend(self.blame(site.expr, text, site.node))
        return True

    def _other_side(self, site: SizeSite, text: str, wanted: int) -> Conflict | None:
        """`view(..., x.shape[1])`: the axis it was read from could have the needed length instead."""
        if not isinstance(site.expr, TensorSize):
            return None
        axis_map = self.analysis.state(site.expr.node).axis(site.expr.axis)
        length = site.expr.node.meta["val"].shape[site.expr.axis]
        return Conflict(text, site.node, axis_map, length, self.value(site.expr), wanted) if axis_map else None

    def _possible(self, guard: Guard, leaf: TensorSize) -> Vector | None:
        """The sizes for which a comparison comes out as recorded, other sizes as they are now; None where that cannot
        be asked of many at once."""
        now, every = self.value(leaf), np.arange(1, leaf.node.meta["val"].shape[leaf.axis] + 1, dtype=np.int64)

        def value(x: Attribute | TensorSize) -> Any:
            return every if isinstance(x, TensorSize) and self.value(x) == now else self.value(x)

        try:
            with np.errstate(all="raise"):
                right = COMPARE[guard.comparison](evaluate(guard.left, value), evaluate(guard.right, value))
        except (ArithmeticError, TypeError):  # a square root of many at once is none
            return None
        found: Vector = every[np.broadcast_to(np.asarray(right) == guard.outcome, every.shape)]
        return found

    def _nearby(self, guard: Guard, leaf: TensorSize) -> int | None:
        """The size nearest to the present one for which a comparison comes out as recorded."""
        now, length = self.value(leaf), leaf.node.meta["val"].shape[leaf.axis]
        for distance in range(1, _NEARBY):
            for candidate in (now + distance, now - distance):
                if not 1 <= candidate < length:
                    continue

                def value(x: Attribute | TensorSize, candidate: int = candidate) -> float:
                    return candidate if isinstance(x, TensorSize) and self.value(x) == now else self.value(x)

                try:
                    left, right = evaluate(guard.left, value), evaluate(guard.right, value)
                except ArithmeticError:
                    continue
                if COMPARE[guard.comparison](left, right) == guard.outcome:
                    return candidate
        return None

    def blame(self, expr: Expr, text: str, node: fx.Node | None, source: Source | None = None) -> list[Conflict]:
        """Everything that changes a number which must not change."""
        out: list[Conflict] = []
        todo, seen = list(leaves(expr)), set[Attribute]()
        while todo:
            leaf = todo.pop(0)
            if isinstance(leaf, TensorSize):
                axis_map = self.analysis.state(leaf.node).axis(leaf.axis)
                length = leaf.node.meta["val"].shape[leaf.axis]
                if axis_map and self.value(leaf) != length:
                    out.append(Conflict(text, node or leaf.node, axis_map, length, self.value(leaf), length, source))
            elif leaf not in seen and self.attributes.get(leaf, leaf.value) != leaf.value:
                seen.add(leaf)
                for site in self.demanded_by.get(leaf, ()):
                    if site.axis_map:
                        out.append(
                            Conflict(text, site.node, site.axis_map, site.length, self.survivors(site), None, source)
                        )
                    # in `width // heads` it follows other numbers that change
                    todo += [other for other in leaves(site.expr) if other != leaf]
        return out

    def _moved(self, guard: Guard, conflict: Conflict) -> Conflict:
        """A width that can be moved a little need not be frozen."""
        if guard.comparison == "same":
            return conflict
        for leaf in (*leaves(guard.left), *leaves(guard.right)):
            if isinstance(leaf, TensorSize) and self.value(leaf) == conflict.survivors:
                possible = self._possible(guard, leaf)
                return dataclasses.replace(conflict, wanted=self._nearby(guard, leaf), possible=possible)
        return conflict

    def _check_guards(self, guards: Iterable[Guard]) -> list[Conflict]:
        out: list[Conflict] = []
        for guard in guards:
            left, right = self.evaluate(guard.left), self.evaluate(guard.right)
            if left is None or right is None:
                continue
            if COMPARE[guard.comparison](left, right) != guard.outcome:
                symbol = {"same": "==", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[
                    guard.comparison
                ]
                text = f"the code asks whether {describe(guard.left)} {symbol} {describe(guard.right)}"
                if guard.comparison == "same":
                    text = f"the code uses {describe(guard.left)} as a plain number"
                found = self.blame(guard.left, text, None, guard.source)
                found += self.blame(guard.right, text, None, guard.source)
                found = [self._moved(guard, c) for c in found]
                out += found
        return out


def describe(expr: Expr) -> str:
    """An expression for people: tensor sizes without node names."""
    if isinstance(expr, TensorSize):
        return f"x.shape[{expr.axis}]"
    if isinstance(expr, Operation):
        return str(dataclasses.replace(expr, args=tuple(_Text(describe(a)) for a in expr.args)))  # type: ignore[misc]
    return str(expr)


class _Text(str):
    """A rendered sub-expression."""


def _solve(expr: Expr, leaf: Attribute, wanted: int, lookup: object) -> int | None:
    """The value of `leaf` that makes `expr` equal `wanted`: proportional, the same, or as much less; checked."""
    old = evaluate(expr, recorded_value)
    if not old or not leaf.value:
        return None
    guesses = {round(leaf.value * wanted / old), round(leaf.value * old / wanted) if wanted else 0, wanted}
    guesses.add(leaf.value + wanted - int(old))
    for guess in sorted(guesses):
        if guess < 1:
            continue

        def value(x: Attribute | TensorSize, guess: int = guess) -> int:
            return guess if x == leaf else lookup(x)  # type: ignore[operator]

        try:
            if evaluate(expr, value) == wanted:
                return int(guess)
        except ArithmeticError:
            continue
    return None


def positions_of(analysis: Analysis, axis_map: AxisMap) -> Vector:
    """All global positions on an axis."""
    parts = [analysis.dims.positions(d, v) for d, v in axis_map.items()]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
