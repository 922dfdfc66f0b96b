"""Backward elimination: which inputs of layers go first when those that stay take over, as products of matrices.

Optimal brain surgeon needs, after every step, the inverse of what is left of a matrix H. Steps one by one are made
among the cheapest units alone, on small matrices; all others learn of a sixteenth of the units at a time, as one
product of matrices. No inverse is changed as a whole: what it loses is noted, and columns are made when they are asked
for (a Cholesky factorisation with pivots). Features lie in the order of their units. Where H comes from fewer rows of
data than it has columns, it is not even made: all that is inverted then is as large as the number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..support.progress import stage

# Of the units left, one in so many goes per step: one at a time below twice this size, several in larger groups.
SHARE = 64
# One in so many goes between two looks at all units; what goes is sought among twice as many, the cheapest.
PART = 16
# With so many left or fewer, all are looked at in every step.
ALL = 32


class Inverse(Protocol):
    """The inverse of what is left of a matrix H. Shapes: problems first; F features are left."""

    def blocks(self, units: int, k: int) -> Tensor:
        """The diagonal blocks of units of k features each, the first ones: (problems, units, k, k)."""

    def part(self, at: Tensor) -> Part:
        """Some of its rows and columns."""

    def without(self, gone: Part, kept: Tensor, root: Tensor) -> tuple[Inverse, Loss]:
        """The inverse of what is kept, and what it has lost; `root`: the lower triangle of what goes."""


class Part(Protocol):
    """A few features of an inverse, by their places `at`."""

    @property
    def minor(self) -> Tensor:
        """Their rows and columns, (problems, len(at), len(at))."""

    def of(self, some: Tensor) -> Part:
        """Those at these places among them."""


class Loss(Protocol):
    """What an inverse loses as features go: e e', for e (problems, kept, gone)."""

    def blocks(self, units: int, k: int) -> Tensor:
        """The diagonal blocks of units of k features each, the first ones: (problems, units, k, k)."""

    def taken(self, values: Tensor, y: Tensor) -> Tensor:
        """values - e y, in place, for y (problems, gone, outputs)."""


class Quadratic(Protocol):
    """A positive definite matrix H, (problems, features, features): errors of weights are squares by it."""

    def times(self, x: Tensor) -> Tensor:
        """H x."""

    def inverse(self, order: Tensor) -> Inverse:
        """The inverse of all of it, features in this order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """H as it is."""

    matrix: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def inverse(self, order: Tensor) -> Inverse:
        found = _inverse(self.matrix)
        return _WholeInverse.of(found if _in_order(order) else found[:, order[:, None], order])


@dataclasses.dataclass(frozen=True, eq=False)
class Thin:
    """H = rows' rows + ridge: `rows` (problems, n, features) with n below the number of features, `ridge` above 0
    (problems, 1, 1)."""

    rows: Tensor
    ridge: Tensor

    def times(self, x: Tensor) -> Tensor:
        return self.rows.mT @ (self.rows @ x) + self.ridge * x

    def inverse(self, order: Tensor) -> Inverse:
        outer = self.rows @ self.rows.mT
        outer.diagonal(dim1=1, dim2=2).add_(self.ridge[:, :, 0])
        rows = self.rows.mT.contiguous()  # one after the other in memory, as what is kept is copied row by row
        return _ThinInverse(rows if _in_order(order) else rows.index_select(1, order), self.ridge, _inverse(outer))


def _in_order(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))


@dataclasses.dataclass(frozen=True, eq=False)
class _WholeInverse:
    """`first`, as it was at first, is never changed: what it has lost since then is e e', for the `count` first columns
    of `lost` (problems, features, features), of which the rows at the places `kept` mean something. Columns are made
    when they are asked for, as those of a Cholesky factor are."""

    first: Tensor
    lost: Tensor
    count: int
    kept: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _WholeInverse:
        first = matrix.mT.contiguous()  # as it is symmetric, no copy of what is laid out by columns
        return cls(first, torch.zeros_like(first), 0, torch.arange(first.shape[1], device=first.device))

    def blocks(self, units: int, k: int) -> Tensor:
        own = self.part(torch.arange(units * k, device=self.kept.device)).minor if self.count else self.first
        return _diagonal(own[:, : units * k, : units * k], k)

    def part(self, at: Tensor) -> Part:
        places = self.kept[at]
        return _WholePart(self, places, *(t.index_select(1, places) for t in (self.first, self.lost)))

    def without(self, gone: Part, kept: Tensor, root: Tensor) -> tuple[Inverse, Loss]:
        assert isinstance(gone, _WholePart)
        e = _of_triangle(root, gone.columns().index_select(1, kept))
        now, end = self.kept[kept], self.count + len(root[0])
        self.lost[:, now, self.count : end] = e
        return _WholeInverse(self.first, self.lost, end, now), _Lost(e)


@dataclasses.dataclass(frozen=True, eq=False)
class _WholePart:
    """`first` and `lost` of the inverse at the places `at` of all there were at first."""

    inverse: _WholeInverse
    at: Tensor
    first: Tensor
    lost: Tensor

    @property
    def minor(self) -> Tensor:
        lost = self.lost[:, :, : self.inverse.count]
        return self.first[:, :, self.at].baddbmm_(lost, lost.mT, alpha=-1)

    def of(self, some: Tensor) -> Part:
        first, lost = (t.index_select(1, some) for t in (self.first, self.lost))
        return _WholePart(self.inverse, self.at[some], first, lost)

    def columns(self) -> Tensor:
        """(problems, F, len(at))."""
        lost, mine = (t[:, :, : self.inverse.count] for t in (self.inverse.lost, self.lost))
        found = torch.baddbmm(self.first.mT, lost, mine.mT, alpha=-1)
        return found if len(self.inverse.kept) == found.shape[1] else found.index_select(1, self.inverse.kept)


@dataclasses.dataclass(frozen=True, eq=False)
class _ThinInverse:
    """(1 - rows middle rows') / ridge with `rows` (problems, F, n), where `middle` inverts rows' rows + ridge
    (Woodbury)."""

    rows: Tensor
    ridge: Tensor
    middle: Tensor

    def blocks(self, units: int, k: int) -> Tensor:
        rows = self.rows[:, : units * k]
        left, right = (t.unflatten(1, (units, k)) for t in (rows @ self.middle, rows))
        found: Tensor = (torch.eye(k).to(rows) - left @ right.mT) / self.ridge[:, None]
        return found

    def part(self, at: Tensor) -> Part:
        rows = self.rows.index_select(1, at)
        return _ThinPart(self, at, rows, rows @ self.middle)

    def without(self, gone: Part, kept: Tensor, root: Tensor) -> tuple[Inverse, Loss]:
        assert isinstance(gone, _ThinPart)
        # of what is kept, the middle is (M^-1 - a a')^-1 = M + M a (1 - a' M a)^-1 a' M; that in brackets is ridge
        # times the rows and columns of the inverse that go, with this root
        part = torch.linalg.solve_triangular(root, gone.lost, upper=False)
        left = _ThinInverse(
            self.rows.index_select(1, kept), self.ridge, self.middle.baddbmm(part.mT / self.ridge, part)
        )
        # none of what is kept goes, so columns are these rows times those that go
        few = part.shape[1] <= part.shape[2]
        loss: Loss = _Lost((left.rows @ part.mT).div_(-self.ridge)) if few else _ThinLost(left.rows, part, self.ridge)
        return (left if len(kept) > part.shape[2] else _WholeInverse.of(left.whole())), loss

    def whole(self) -> Tensor:
        """All of it."""
        found = ((self.rows @ self.middle) @ self.rows.mT).neg_()
        found.diagonal(dim1=1, dim2=2).add_(1)
        return found.div_(self.ridge)


@dataclasses.dataclass(frozen=True, eq=False)
class _ThinPart:
    """`rows` of the inverse at these places, and `lost`: these times its middle."""

    inverse: _ThinInverse
    at: Tensor
    rows: Tensor
    lost: Tensor

    @property
    def minor(self) -> Tensor:
        found = (self.lost @ self.rows.mT).neg_()
        found.diagonal(dim1=1, dim2=2).add_(1)
        return found.div_(self.inverse.ridge)

    def of(self, some: Tensor) -> Part:
        return _ThinPart(self.inverse, self.at[some], *(t.index_select(1, some) for t in (self.rows, self.lost)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Lost:
    """See `Loss`."""

    e: Tensor

    def blocks(self, units: int, k: int) -> Tensor:
        return _own(self.e, units, k)

    def taken(self, values: Tensor, y: Tensor) -> Tensor:
        return values.baddbmm_(self.e.to(values.dtype), y.to(values.dtype), alpha=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class _ThinLost:
    """e = -rows part' / ridge, which is not made where it has more columns than `rows` (problems, kept, n)."""

    rows: Tensor
    part: Tensor
    ridge: Tensor

    def blocks(self, units: int, k: int) -> Tensor:
        rows = self.rows[:, : units * k]
        left, right = (t.unflatten(1, (units, k)) for t in (rows @ (self.part.mT @ self.part), rows))
        found: Tensor = (left @ right.mT) / self.ridge[:, None].square()
        return found

    def taken(self, values: Tensor, y: Tensor) -> Tensor:
        return values.baddbmm_(self.rows.to(values.dtype), (self.part.mT @ y / self.ridge).to(values.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One reader of a group: how errors of its weights count, these, and which of its inputs each unit stands for.

    `weights` (problems, features, outputs) are held in the precision that they come in; `features` (units, k);
    `energy`: what errors are divided by; `scale` (problems, 1, outputs), above 0: the unit in which errors of results
    count, one where it is not given.
    """

    quadratic: Quadratic
    weights: Tensor
    features: Tensor
    energy: float
    scale: Tensor | None = None


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
        with stage("eliminating", max(0, gone - len(self.order)), "units") as now:
            while len(self.order) < gone:
                now.advance(self._block(gone))

    def _block(self, gone: int) -> int:
        """Some units of those that go, and how many these are."""
        left, price = len(self._alive), self._prices()
        count = min(max(1, left // PART) if left > ALL else left - 1, gone - len(self.order))
        among = price.argsort(stable=True)[: 1 if count == 1 else left if left <= ALL else 2 * count]
        parts = [state.part(among) for state in self._states]
        if count > 1:
            first, costs = cheapest(_candidates(parts), count, max(1, left // SHARE))
        else:
            first, costs = torch.zeros(1, dtype=torch.long, device=among.device), price[among].tolist()
        going = among[first]
        self.order += self._alive[going].tolist()
        self.costs += costs
        stay = torch.ones(left, dtype=torch.bool, device=price.device)
        stay[going] = False
        kept = torch.nonzero(stay)[:, 0]
        for state, part in zip(self._states, parts, strict=True):
            state.remove(part, first, kept)
        self._alive = self._alive[kept]
        return len(costs)

    def finish(self) -> tuple[list[int], list[float]]:
        """All units: the last one costs everything that is still explained."""
        self.until(len(self.order) + len(self._alive) - 1)
        return [*self.order, *self._alive.tolist()], [*self.costs, float(self._prices().sum())]

    def refits(self) -> list[Tensor]:
        """How the weights of each problem (problems, features, outputs) change where the units went so far and those
        left take over as well as they can."""
        return [state.refit() for state in self._states]

    def _prices(self) -> Tensor:
        return torch.stack([state.prices() for state in self._states]).sum(0)


class _State:
    """What is left of a problem, features of its units first, unit by unit, then all others. With H the matrix of what
    stays and V its weights now: `_blocks` the diagonal blocks of H^-1, `_squares` those of V V', (problems, units, k,
    k)."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self.energy = problem, problem.energy
        self._units, self._k = problem.features.shape
        others = torch.ones(problem.weights.shape[1], dtype=torch.bool, device=problem.weights.device)
        own = problem.features.flatten()
        others[own] = False
        self._kept = torch.cat([own, torch.nonzero(others)[:, 0]])  # the features that are left
        self._values = problem.weights.index_select(1, self._kept)
        if problem.scale is not None:
            self._values.mul_(problem.scale)
        self._inverse = problem.quadratic.inverse(self._kept)
        self._blocks = self._inverse.blocks(self._units, self._k)
        self._square()

    def prices(self) -> Tensor:
        return _prices(self._blocks, self._squares) / self.energy

    def part(self, units: Tensor) -> _Few:
        """Some of the units that are left, by their places among these."""
        at = _features(units, self._k)
        return _Few(self._inverse.part(at), self._values.index_select(1, at), self._k, self.energy)

    def remove(self, few: _Few, which: Tensor, stay: Tensor) -> None:
        """Of these units, those at the places `which` go; `stay`: the places of those that do not, of all."""
        some = _features(which, self._k)
        gone = few.inverse.of(some)
        root = _root(gone.minor)
        rest = torch.arange(self._units * self._k, len(self._kept), device=stay.device)
        kept = torch.cat([_features(stay, self._k), rest])
        # H^-1 loses e e', V loses e y
        y = torch.linalg.solve_triangular(root, few.values.index_select(1, some).to(root.dtype), upper=False)
        self._inverse, loss = self._inverse.without(gone, kept, root)
        self._units = len(stay)
        self._blocks = self._blocks.index_select(1, stay) - loss.blocks(self._units, self._k)
        self._values = loss.taken(self._values.index_select(1, kept), y)
        self._kept = self._kept[kept]
        self._square()

    def _square(self) -> None:
        self._squares = _own(self._values, self._units, self._k).to(self._blocks.dtype)

    def refit(self) -> Tensor:
        scale = self._problem.scale
        left = self._values if scale is None else self._values / scale
        return (-self._problem.weights).index_add_(1, self._kept, left)


def _features(units: Tensor, k: int) -> Tensor:
    """The places of features, of units by their places."""
    return units if k == 1 else (units[:, None] * k + torch.arange(k, device=units.device)).flatten()


def _own(x: Tensor, units: int, k: int) -> Tensor:
    """The diagonal blocks of x x', of units of k features each, the first rows."""
    rows = x[:, : units * k]
    if k == 1:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
        return norms.square_()[:, :, None, None]
    blocks: Tensor = rows.unflatten(1, (units, k))
    return blocks @ blocks.mT


def _of_triangle(root: Tensor, columns: Tensor) -> Tensor:
    """columns root'^-1, for the lower triangle `root`."""
    if root.shape[1] == 1:
        return columns / root
    found: Tensor = torch.linalg.solve_triangular(root.mT, columns, upper=True, left=False)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Few:
    """A few of the units of a state: these rows and columns of the inverse, and their `values`."""

    inverse: Part
    values: Tensor
    k: int
    energy: float

    def matrices(self) -> tuple[Tensor, Tensor]:
        """See `_Candidates`."""
        inverse = self.inverse.minor
        return inverse, (self.values @ self.values.mT).to(inverse.dtype).div_(self.energy)


def _candidates(parts: Sequence[_Few]) -> list[_Candidates]:
    """The same units in several problems; those with as many features per unit together."""
    found = []
    for k in dict.fromkeys(part.k for part in parts):
        inverses, squares = zip(*(part.matrices() for part in parts if part.k == k), strict=True)
        found.append(_Candidates(torch.cat(inverses), torch.cat(squares), k))
    return found


class _Candidates:
    """A few units: the rows and columns of their features in H^-1 and in V V', (problems, units k, units k), the latter
    divided by the energy.

    Both stay as they were. What the first has lost since then is e' e, and the second e' h + h' e, rows that are
    noted; only the diagonal blocks are those of now, and other rows are made when a unit goes.
    """

    def __init__(self, inverse: Tensor, squares: Tensor, k: int) -> None:
        self._inverse, self._squares, self.k = inverse, squares, k
        self._blocks, self._square_blocks = (_diagonal(t, k).clone() for t in (inverse, squares))
        self._e, self._h = torch.empty_like(inverse), torch.empty_like(squares)
        self._noted = 0

    def prices(self) -> Tensor:
        return _prices(self._blocks, self._square_blocks)

    def remove(self, units: Tensor) -> None:
        at = _features(units, self.k)
        root, e, h = self._lost(at)
        noted = slice(self._noted, self._noted + len(at))
        self._noted += len(at)
        self._e[:, noted], self._h[:, noted] = e, h
        if self.k == 1:
            self._blocks -= e.square().sum(1)[:, :, None, None]
            self._square_blocks -= (e * h).sum(1).mul_(2)[:, :, None, None]
        else:
            left, right = (t.unflatten(2, (-1, self.k)).permute(0, 2, 3, 1) for t in (e, h))
            self._blocks -= left @ left.mT
            both = left @ right.mT
            self._square_blocks -= both + both.mT
        self._blocks[:, units] = torch.eye(self.k).to(root)  # of what is gone, whatever has an inverse
        self._square_blocks[:, units] = 0

    def _lost(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is noted as these features go: the root of their part of H^-1, e and h."""
        rows = torch.cat([t.index_select(1, at) for t in (self._inverse, self._squares)], 2)
        inverse, squares = rows.chunk(2, 2)
        if self._noted:
            e, h = self._e[:, : self._noted], self._h[:, : self._noted]
            of_e, of_h = (t.index_select(2, at).mT for t in (e, h))
            inverse.baddbmm_(of_e, e, alpha=-1)
            squares.baddbmm_(of_e, h, alpha=-1).baddbmm_(of_h, e, alpha=-1)
        root = _root(inverse[:, :, at])
        e, q = torch.linalg.solve_triangular(root, rows, upper=False).chunk(2, 2)
        middle = torch.linalg.solve_triangular(root, q[:, :, at].mT, upper=False)
        return root, e, torch.baddbmm(q, middle, e, alpha=-0.5)


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
