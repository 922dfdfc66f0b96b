"""Backward elimination: which inputs of layers go first when those that stay take over, as products of matrices.

Optimal brain surgeon needs, after every step, the inverse of what is left of a matrix H. It is never updated as a
whole: a step works on the columns of the units that go and on the diagonal blocks that prices are made of, and what the
last steps did to all the rest is one product of matrices, caught up with from time to time. Where H comes from fewer
rows of data than it has columns, it is not even made: all that is inverted then is as large as the number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Of the units left, one in so many goes per step: one at a time in groups up to this size, several in larger ones.
SHARE = 64
# Columns of steps that are caught up with at a time.
_PENDING = 256


class Inverse(Protocol):
    """The inverse of what is left of a matrix H. Shapes: problems first; F columns are left."""

    def columns(self, at: Tensor) -> Tensor:
        """(problems, F, len(at))."""

    def blocks(self, features: Tensor) -> Tensor:
        """The diagonal blocks of some features (units, k): (problems, units, k, k)."""

    def shrink(self, kept: Tensor, gone: Tensor, change: Tensor) -> None:
        """Leave out what is gone. `change` (problems, F, any): minus its product with its transpose, the inverse is
        that of what is kept."""

    def refit(self, kept: Tensor, gone: Tensor, weights: Tensor) -> Tensor:
        """What the weights (problems, kept, outputs) of the features that are left gain when they take over from those
        that went; `kept`, `gone`: places in `weights` and in H as it was, `kept` as last given to `shrink`."""


class Quadratic(Protocol):
    """A positive definite matrix H, (problems, features, features): errors of weights are squares by it."""

    def times(self, x: Tensor) -> Tensor:
        """H x."""

    def inverse(self) -> Inverse:
        """Its inverse, to be changed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """H as it is."""

    matrix: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def inverse(self) -> Inverse:
        return _WholeInverse(self.matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """H = rows' rows + ridge: `rows` (problems, n, features) with n below the number of features, `ridge` above 0
    (problems, 1, 1)."""

    rows: Tensor
    ridge: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.rows.mT @ (self.rows @ x) + self.ridge * x

    def inverse(self) -> Inverse:
        return _ThinInverse(self.rows, self.ridge)


class _WholeInverse:
    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._values = matrix, _inverse(matrix)

    def columns(self, at: Tensor) -> Tensor:
        return self._values[:, :, at]

    def blocks(self, features: Tensor) -> Tensor:
        return self._values[:, features[:, :, None], features[:, None, :]]

    def shrink(self, kept: Tensor, gone: Tensor, change: Tensor) -> None:
        values, e = self._values[:, kept[:, None], kept], change[:, kept]
        self._values = values.baddbmm_(e, e.mT, alpha=-1)

    def refit(self, kept: Tensor, gone: Tensor, weights: Tensor) -> Tensor:
        return self._values @ (self._matrix[:, kept[:, None], gone] @ weights[:, gone])


class _ThinInverse:
    """(1 - rows' P rows) / ridge, where P inverts rows rows' + ridge (Woodbury)."""

    def __init__(self, rows: Tensor, ridge: Tensor) -> None:
        self._all = self._rows = rows
        self._ridge = ridge
        self._outer = rows @ rows.mT
        self._invert()

    def _invert(self) -> None:
        self._middle = _inverse(self._outer + self._ridge * torch.eye(self._outer.shape[1]).to(self._outer))

    def columns(self, at: Tensor) -> Tensor:
        found = self._rows.mT @ (self._middle @ self._rows[:, :, at])
        found.neg_()
        found[:, at, torch.arange(len(at), device=at.device)] += 1
        return found.div_(self._ridge)

    def blocks(self, features: Tensor) -> Tensor:
        units, k = features.shape
        rows = self._rows[:, :, features.flatten()]
        both = (self._middle @ rows).unflatten(2, (units, k)), rows.unflatten(2, (units, k))
        right, left = (t.permute(0, 2, 1, 3) for t in both)  # (problems, units, n, k)
        return (torch.eye(k).to(rows) - left.mT @ right) / self._ridge[:, None]

    def shrink(self, kept: Tensor, gone: Tensor, change: Tensor) -> None:
        lost = self._rows[:, :, gone]
        self._outer = self._outer - lost @ lost.mT
        self._rows = self._rows[:, :, kept]
        self._invert()

    def refit(self, kept: Tensor, gone: Tensor, weights: Tensor) -> Tensor:
        return self._rows.mT @ (self._middle @ (self._all[:, :, gone] @ weights[:, gone]))


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
    cheapest one of those left after the other, in groups of 128 units and more the cheapest 1/64 together."""

    def __init__(self, problems: Sequence[Problem], units: int) -> None:
        self.order: list[int] = []
        self.costs: list[float] = []
        self._states = [_State(problem) for problem in problems]
        self._alive = torch.arange(units, device=problems[0].weights.device)

    def until(self, gone: int) -> None:
        """Go on until so many units are gone; at least one has to stay."""
        while len(self.order) < gone:
            price = self._prices()
            count = min(max(1, len(self._alive) // SHARE), gone - len(self.order))
            cheapest = price.argsort(stable=True)[:count]
            self.order += self._alive[cheapest].tolist()
            self.costs += price[cheapest].tolist()
            left = torch.ones(len(self._alive), dtype=torch.bool, device=price.device)
            left[cheapest] = False
            for state in self._states:
                state.remove(cheapest, left)
            self._alive = self._alive[left]

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
    of H^-1, `_squares` those of V V', (problems, units, k, k). H^-1 and V themselves are as they were some steps ago:
    since then H^-1 lost E E', and V lost E Y."""

    def __init__(self, problem: Problem) -> None:
        self._inverse, self._values, self.energy = problem.quadratic.inverse(), problem.weights, problem.energy
        self._places = problem.features  # of the units that are left
        self._kept = torch.arange(problem.weights.shape[1], device=problem.weights.device)
        self._blocks = self._inverse.blocks(problem.features)
        rows = problem.weights[:, problem.features]
        self._squares = rows @ rows.mT
        self._forget()

    def _forget(self) -> None:
        problems, features, outputs = self._values.shape
        k = self._places.shape[1]
        self._room = max(_PENDING, k * max(1, len(self._places) // SHARE))
        self._e = self._values.new_empty(problems, features, min(self._room, len(self._places) * k))
        self._y = self._values.new_empty(problems, self._e.shape[2], outputs)
        self._used = 0
        self._gone = torch.zeros(features, dtype=torch.bool, device=self._values.device)

    def prices(self) -> Tensor:
        """tr(V_u' (H^-1)_uu^-1 V_u) of each unit that is left, summed over problems."""
        if self._blocks.shape[-1] == 1:  # a division each, where small systems would take their time
            price = (self._squares / self._blocks).sum((0, 2, 3))
        else:
            solved = torch.linalg.solve(self._blocks, self._squares)
            price = solved.diagonal(dim1=2, dim2=3).sum((0, 2))
        found: Tensor = price / self.energy
        return found

    def remove(self, units: Tensor, left: Tensor) -> None:
        """The units at these places among those that are left go; `left`: the mask of those that do not."""
        at = self._places[units].flatten()
        if self._used + len(at) > self._e.shape[2]:
            self._catch_up()
            at = self._places[units].flatten()
        e, y = self._step(at)
        places = self._places[left]
        part, products = e[:, places], self._of_values(y, places)
        half = products - part @ (y @ y.mT)[:, None] / 2
        self._blocks = self._blocks[:, left] - part @ part.mT
        both = part @ half.mT
        self._squares = self._squares[:, left] - both - both.mT
        self._places = places
        self._gone[at] = True
        self._used += len(at)
        if self._used * 8 > len(self._gone):
            self._catch_up()

    def _step(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """What H^-1 and V lose as these features go: E E' and E Y."""
        done, before = self._e[:, :, : self._used], self._y[:, : self._used]
        columns = self._inverse.columns(at)
        columns = columns.baddbmm_(done, done[:, at].mT, alpha=-1)
        root = _root(columns[:, at])
        e = torch.linalg.solve_triangular(root.mT, columns, upper=True, left=False)
        values = self._values[:, at].baddbmm_(done[:, at], before, alpha=-1)
        y = torch.linalg.solve_triangular(root, values, upper=False)
        self._e[:, :, self._used : self._used + len(at)] = e
        self._y[:, self._used : self._used + len(at)] = y
        return e, y

    def _of_values(self, y: Tensor, places: Tensor) -> Tensor:
        """V y' of units, (problems, units, k, columns)."""
        done, before = self._e[:, :, : self._used], self._y[:, : self._used]
        products = self._values @ y.mT
        products.baddbmm_(done, before @ y.mT, alpha=-1)
        return products[:, places]

    def _catch_up(self) -> None:
        """Bring H^-1 and V up to date, and leave out what went."""
        kept, gone = (torch.nonzero(mask)[:, 0] for mask in (~self._gone, self._gone))
        if not len(gone):
            return
        e = self._e[:, :, : self._used]
        self._values = self._values[:, kept].baddbmm_(e[:, kept], self._y[:, : self._used], alpha=-1)
        self._inverse.shrink(kept, gone, e)
        self._places = ((~self._gone).cumsum(0) - 1)[self._places]
        self._kept = self._kept[kept]
        self._forget()

    def refit(self, weights: Tensor) -> Tensor:
        self._catch_up()
        gone = torch.ones(weights.shape[1], dtype=torch.bool, device=weights.device)
        gone[self._kept] = False
        change = -weights
        change[:, self._kept] = self._inverse.refit(self._kept, torch.nonzero(gone)[:, 0], weights)
        return change


def _inverse(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if bool(info.any()) else torch.cholesky_inverse(factor)


def _root(matrix: Tensor) -> Tensor:
    """The lower triangle R with R R' the matrix; rounding may have left it slightly indefinite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = (values.abs().amax(1, keepdim=True) * 1e-14).clamp_min(torch.finfo(matrix.dtype).tiny)
    return torch.linalg.cholesky(vectors * torch.maximum(values, floor)[:, None, :] @ vectors.mT)
