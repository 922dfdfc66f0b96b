"""Backward elimination: which inputs of layers go first when those that stay take over, as products of matrices.

Optimal brain surgeon needs, after every step, the inverse of what is left of a matrix H. Steps one by one are made
among the cheapest units alone, on small matrices; all others learn of a sixteenth of the units at a time, as one
product of matrices. Where H comes from fewer rows of data than it has columns, it is not even made: all that is
inverted then is as large as the number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Of the units left, one in so many goes per step: one at a time below twice this size, several in larger groups.
SHARE = 64
# One in so many goes between two looks at all units; what goes is sought among twice as many, the cheapest.
PART = 16
# With so many left or fewer, all are looked at in every step.
ALL = 32


class Inverse(Protocol):
    """The inverse of what is left of a matrix H. Shapes: problems first; F features are left."""

    def times(self, x: Tensor) -> Tensor:
        """(problems, F, any)."""

    def columns(self, at: Tensor) -> Tensor:
        """(problems, F, len(at))."""

    def minors(self, features: Tensor) -> Tensor:
        """Rows and columns of sets of features (sets, k): (problems, sets, k, k)."""

    def without(self, gone: Tensor, kept: Tensor, change: Tensor) -> Inverse:
        """The inverse of what is kept. `change` (problems, F, len(gone)): its product with its transpose is what the
        inverse loses."""


class Quadratic(Protocol):
    """A positive definite matrix H, (problems, features, features): errors of weights are squares by it."""

    def times(self, x: Tensor) -> Tensor:
        """H x."""

    def between(self, kept: Tensor, gone: Tensor, x: Tensor) -> Tensor:
        """The rows `kept` and columns `gone` of H, times x (problems, len(gone), any)."""

    def inverse(self) -> Inverse:
        """The inverse of all of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """H as it is."""

    matrix: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def between(self, kept: Tensor, gone: Tensor, x: Tensor) -> Tensor:
        return self.matrix[:, kept[:, None], gone] @ x

    def inverse(self) -> Inverse:
        return _WholeInverse(_inverse(self.matrix))


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """H = rows' rows + ridge: `rows` (problems, n, features) with n below the number of features, `ridge` above 0
    (problems, 1, 1)."""

    rows: Tensor
    ridge: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.rows.mT @ (self.rows @ x) + self.ridge * x

    def between(self, kept: Tensor, gone: Tensor, x: Tensor) -> Tensor:
        return self.rows[:, :, kept].mT @ (self.rows[:, :, gone] @ x)

    def inverse(self) -> Inverse:
        outer = self.rows @ self.rows.mT
        outer.diagonal(dim1=1, dim2=2).add_(self.ridge[:, :, 0])
        return _ThinInverse(self.rows, self.ridge, _inverse(outer))


@dataclasses.dataclass(frozen=True, eq=False)
class _WholeInverse:
    values: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.values @ x

    def columns(self, at: Tensor) -> Tensor:
        return self.values[:, :, at]

    def minors(self, features: Tensor) -> Tensor:
        return self.values[:, features[:, :, None], features[:, None, :]]

    def without(self, gone: Tensor, kept: Tensor, change: Tensor) -> Inverse:
        e = change[:, kept]
        return _WholeInverse(self.values[:, kept[:, None], kept].baddbmm_(e, e.mT, alpha=-1))


@dataclasses.dataclass(frozen=True, eq=False)
class _ThinInverse:
    """(1 - rows' middle rows) / ridge, where `middle` inverts rows rows' + ridge (Woodbury)."""

    rows: Tensor
    ridge: Tensor
    middle: Tensor

    def times(self, x: Tensor) -> Tensor:
        return (x - self.rows.mT @ (self.middle @ (self.rows @ x))) / self.ridge

    def columns(self, at: Tensor) -> Tensor:
        found = (self.rows.mT @ (self.middle @ self.rows[:, :, at])).neg_()
        found[:, at, torch.arange(len(at), device=at.device)] += 1
        return found.div_(self.ridge)

    def minors(self, features: Tensor) -> Tensor:
        sets, k = features.shape
        rows = self.rows[:, :, features.flatten()]
        both = (self.middle @ rows).unflatten(2, (sets, k)), rows.unflatten(2, (sets, k))
        right, left = (t.permute(0, 2, 1, 3) for t in both)  # (problems, sets, n, k)
        found: Tensor = (torch.eye(k).to(rows) - left.mT @ right) / self.ridge[:, None]
        return found

    def without(self, gone: Tensor, kept: Tensor, change: Tensor) -> Inverse:
        if len(kept) <= self.rows.shape[1]:
            e = change[:, kept]
            return _WholeInverse(self.columns(kept)[:, kept].baddbmm_(e, e.mT, alpha=-1))
        lost = self.middle @ self.rows[:, :, gone]
        # of what is kept, the middle is (M^-1 - a a')^-1 = M + M a (1 - a' M a)^-1 a' M; that in brackets is ridge
        # times the rows and columns of the inverse that go, whose root is what `change` holds there
        root = change[:, gone]
        part = torch.linalg.solve_triangular(root.mT, lost, upper=True, left=False)
        middle = self.middle.baddbmm(part / self.ridge, part.mT)
        return _ThinInverse(self.rows[:, :, kept], self.ridge, middle)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One reader of a group: how errors of its weights count, these, and which of its inputs each unit stands for.

    `weights` (problems, features, outputs), in the unit in which errors count; `features` (units, k); `energy`: what
    errors are divided by.
    """

    quadratic: Quadratic
    weights: Tensor
    features: Tensor
    energy: float


class Elimination:
    """The units in the order in which they go (`order`), and what each removal costs (`costs`), as far as it got: the
    cheapest one of those left after the other, in groups of 128 units and more the cheapest 1/64 together. Of more
    than 32 units, a sixteenth goes before prices of all are looked at again; until then the cheapest one is that of
    the eighth that was cheapest at first."""

    def __init__(self, problems: Sequence[Problem], units: int) -> None:
        self.order: list[int] = []
        self.costs: list[float] = []
        self._states = [_State(problem) for problem in problems]
        self._alive = torch.arange(units, device=problems[0].weights.device)

    def until(self, gone: int) -> None:
        """Go on until so many units are gone; at least one has to stay."""
        while len(self.order) < gone:
            left, price = len(self._alive), self._prices()
            count = min(max(1, left // PART) if left > ALL else left - 1, gone - len(self.order))
            going = price.argsort(stable=True)[: left if left <= ALL else 2 * count]
            if count == 1:
                going = going[:1]
            costs = price[going].tolist()
            if count > 1:
                first, costs = cheapest([s.among(going) for s in self._states], count, max(1, left // SHARE))
                going = going[first]
            self.order += self._alive[going].tolist()
            self.costs += costs
            stay = torch.ones(left, dtype=torch.bool, device=price.device)
            stay[going] = False
            for state in self._states:
                state.remove(going, stay)
            self._alive = self._alive[stay]

    def finish(self) -> tuple[list[int], list[float]]:
        """All units: the last one costs everything that is still explained."""
        self.until(len(self.order) + len(self._alive) - 1)
        return [*self.order, *self._alive.tolist()], [*self.costs, float(self._prices().sum())]

    def refits(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """How weights (one of each problem: problems, features, outputs) change where the units went so far and those
        left take over as well as they can."""
        return [state.refit(w) for state, w in zip(self._states, weights, strict=True)]

    def _prices(self) -> Tensor:
        return torch.stack([state.prices() for state in self._states]).sum(0)


class _State:
    """What is left of a problem. With H the matrix of what stays and V its weights now: `_blocks` the diagonal blocks
    of H^-1, `_squares` those of V V', (problems, units, k, k)."""

    def __init__(self, problem: Problem) -> None:
        self._quadratic, self.energy = problem.quadratic, problem.energy
        self._inverse, self._values = problem.quadratic.inverse(), problem.weights
        self._places = problem.features  # of the units that are left, among the features that are
        self._kept = torch.arange(problem.weights.shape[1], device=problem.weights.device)
        self._blocks = self._inverse.minors(problem.features)
        self._square()

    def prices(self) -> Tensor:
        return _prices(self._blocks, self._squares) / self.energy

    def among(self, units: Tensor) -> _Candidates:
        """Some of the units that are left, by their places among these."""
        at = self._places[units].flatten()
        values = self._values[:, at]
        return _Candidates(self._inverse.minors(at[None])[:, 0], values @ values.mT, self._places.shape[1], self.energy)

    def remove(self, units: Tensor, stay: Tensor) -> None:
        """The units at these places among those that are left go; `stay`: the mask of those that do not."""
        at, places = self._places[units].flatten(), self._places[stay]
        columns = self._inverse.columns(at)
        root = _root(columns[:, at])
        # H^-1 loses e e', V loses e y
        e = torch.linalg.solve_triangular(root.mT, columns, upper=True, left=False)
        y = torch.linalg.solve_triangular(root, self._values[:, at], upper=False)
        part = e[:, places]
        self._blocks = self._blocks[:, stay] - part @ part.mT
        mask = torch.ones(len(self._kept), dtype=torch.bool, device=at.device)
        mask[at] = False
        kept = torch.nonzero(mask)[:, 0]
        self._values = self._values[:, kept].baddbmm_(e[:, kept], y, alpha=-1)
        self._inverse = self._inverse.without(at, kept, e)
        self._places = (mask.cumsum(0) - 1)[places]
        self._kept = self._kept[kept]
        self._square()

    def _square(self) -> None:
        rows = self._values[:, self._places]
        self._squares = rows @ rows.mT

    def refit(self, weights: Tensor) -> Tensor:
        gone = torch.ones(weights.shape[1], dtype=torch.bool, device=weights.device)
        gone[self._kept] = False
        at = torch.nonzero(gone)[:, 0]
        change = -weights
        change[:, self._kept] = self._inverse.times(self._quadratic.between(self._kept, at, weights[:, at]))
        return change


@dataclasses.dataclass
class _Candidates:
    """A few units: the rows and columns of their features in H^-1 and in V V', (problems, units k, units k). Changed as
    units go."""

    inverse: Tensor
    squares: Tensor
    k: int
    energy: float

    def prices(self) -> Tensor:
        return _prices(*(_diagonal(t, self.k) for t in (self.inverse, self.squares))) / self.energy

    def remove(self, units: Tensor) -> None:
        at = (units[:, None] * self.k + torch.arange(self.k, device=units.device)).flatten()
        root = _root(self.inverse[:, at[:, None], at])
        both = torch.cat([self.inverse[:, :, at], self.squares[:, :, at]], 1)
        e, q = torch.linalg.solve_triangular(root.mT, both, upper=True, left=False).chunk(2, 1)
        half = q - e @ torch.linalg.solve_triangular(root, q[:, at], upper=False) / 2
        self.inverse.baddbmm_(e, e.mT, alpha=-1)
        self.squares.baddbmm_(e, half.mT, alpha=-1).baddbmm_(half, e.mT, alpha=-1)
        for matrix in (self.inverse, self.squares):
            matrix[:, at] = 0
            matrix[:, :, at] = 0
        self.inverse[:, at, at] = 1


def cheapest(candidates: Sequence[_Candidates], count: int, together: int) -> tuple[Tensor, list[float]]:
    """Which of the candidates go, one after the other (`together`: so many per step), and what each costs."""
    order: list[Tensor] = []
    costs: list[float] = []
    while len(costs) < count:
        price = torch.stack([c.prices() for c in candidates]).sum(0)
        for units in order:
            price[units] = torch.inf
        going = price.argsort(stable=True)[: min(together, count - len(costs))]
        order.append(going)
        costs += price[going].tolist()
        for c in candidates if len(costs) < count else ():
            c.remove(going)
    return torch.cat(order), costs


def _diagonal(matrix: Tensor, k: int) -> Tensor:
    """The diagonal blocks, (problems, units, k, k)."""
    if k == 1:
        return matrix.diagonal(dim1=1, dim2=2)[:, :, None, None]
    blocks = matrix.unflatten(2, (-1, k)).unflatten(1, (-1, k))
    found: Tensor = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return found


def _prices(blocks: Tensor, squares: Tensor) -> Tensor:
    """tr(V_u' (H^-1)_uu^-1 V_u) of each unit, summed over problems: `blocks` (H^-1)_uu, `squares` V_u V_u'."""
    if blocks.shape[-1] == 1:  # a division each, where small systems would take their time
        price: Tensor = (squares / blocks).sum((0, 2, 3))
    else:
        price = torch.linalg.solve(blocks, squares).diagonal(dim1=2, dim2=3).sum((0, 2))
    return price


def _inverse(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    found: Tensor = torch.linalg.inv(matrix) if bool(info.any()) else torch.cholesky_inverse(factor)
    return found


def _root(matrix: Tensor) -> Tensor:
    """The lower triangle R with R R' the matrix; rounding may have left it slightly indefinite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = (values.abs().amax(1, keepdim=True) * 1e-14).clamp_min(torch.finfo(matrix.dtype).tiny)
    factor = torch.linalg.cholesky(vectors * torch.maximum(values, floor)[:, None, :] @ vectors.mT)
    return factor
