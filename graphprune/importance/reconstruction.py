"""Worth by what the layers that read a channel would lose: "reconstruction"."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..dependency.groups import Group, Member
from .calibration import Moments, weight_matrix
from .calibration.gradients import sensitivities
from .context import Floats, ImportanceContext
from .in_context import Reading, measured_costs
from .magnitude import mean_norm
from .registry import criterion

# Ridge on the inputs' covariance, times its mean diagonal.
RIDGE = 1e-3
# Of the units left, one in so many goes per step: one at a time in groups up to this size, several in larger ones.
_SHARE = 64


@dataclasses.dataclass
class Problem:
    """One reader of a group: covariance of its inputs, its weights, and which inputs each unit stands for.

    `covariance`: (problems, features, features), centred, per row, ridge included; `weights` (problems, features,
    outputs), in the unit in which errors count; `features` (units, k); `energy`: what errors are divided by.
    """

    covariance: Tensor
    weights: Tensor
    features: Tensor
    energy: float


@criterion("reconstruction", comparable=True, needs="inputs", folded=True)
def reconstruction(context: ImportanceContext, group: Group) -> Floats:
    """Squared error that the layers which read the channels cannot make up for, as they lose one unit after the other.

    Optimal brain surgeon (Hassibi & Stork, NIPS 1992) with whole units: with H the covariance of a layer's inputs and W
    its weights, removing unit u and refitting the rest costs tr(W_u' (H^-1)_uu^-1 W_u); the cheapest unit goes, W and
    H^-1 are updated, and so on until one is left (greedy; in groups of 128 units and more the cheapest 1/64 go
    together). Errors of the layers' results are weighed by what they do to the network's outputs (`sensitivities`). A
    unit's score is what its removal added, summed over the layers, and never less than that of the units before it.

    Where groups are compared (budgets, global scope), the sums of these costs are brought to the errors of the
    network's outputs that are measured with part of the group gone and its readers refitted (`measured_costs`):
    place by place and to first order they are far too low where errors of many places add up, as before a global mean.
    Comparable across groups as it is.

    A group that no linear layer or convolution reads (queries and keys) is scored by its share of squared weights.
    """
    readings = [r for member in context.members(group, ("in",)) if (r := _reading(context, member)) is not None]
    if not readings:
        squares = np.square(mean_norm(context, group, 2))
        total = float(squares.sum())
        return squares / total if total > 0 else squares
    order, costs = eliminate([_problem(context, reading) for reading in readings], group.size)
    if context.compared and group.size > 1:
        costs = measured_costs(context.calibration, readings, order, costs)
    return scores_in_order(order, costs)


def scores_in_order(order: list[int], costs: list[float]) -> Floats:
    """One score per unit: its cost, raised so that units which go later never score less, ties included."""
    rising = np.maximum.accumulate(np.maximum(np.asarray(costs), 0.0))
    # a tie would be resolved by index, so the order is written into the last digits
    rising = rising * (1 + 1e-9 * np.arange(len(rising))) + 1e-30 * np.arange(len(rising))
    scores = np.empty(len(order))
    scores[order] = rising
    return scores


def _reading(context: ImportanceContext, member: Member) -> Reading | None:
    calibration = context.calibration
    reader = calibration.readers.get(member.parameter)
    if reader is None or not calibration.measurable(member.parameter) or member.axis != reader.in_axis:
        return None
    moments = calibration.moments([member.parameter])[0]
    weight = calibration.weights[member.parameter]
    matrix = weight_matrix(reader, weight)
    taps = matrix.shape[1] // weight.shape[reader.in_axis]
    positions = torch.from_numpy(member.positions.copy()).to(weight.device)
    features = (positions[:, :, None] * taps + torch.arange(taps, device=weight.device)).flatten(1)
    covariance = covariance_of(moments)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    ridge = (RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(1e-30).expand_as(diagonal)
    mean = moments.gram[:, -1, :-1] / max(moments.rows, 1)
    return Reading(reader, matrix, covariance + torch.diag_embed(ridge), mean, features)


def _problem(context: ImportanceContext, reading: Reading) -> Problem:
    """The weights, their outputs scaled so that squared errors count by what they do to the network's outputs. Where
    the outputs do not depend on the layer through gradients, errors are relative to the variance of its results."""
    matrix, energy = reading.matrix, 1.0
    found = context.calibration.cached(sensitivities).get(reading.reader.weight)
    if found is None or not bool(torch.isfinite(found).all()) or not float(found.sum()) > 0:
        energy = float((matrix * (reading.covariance @ matrix)).sum())
    else:
        matrix = matrix * found.sqrt().reshape(matrix.shape[0], 1, -1)
    return Problem(reading.covariance, matrix, reading.features, max(energy, 1e-30))


def covariance_of(moments: Moments) -> Tensor:
    """Centred second moments of the inputs, (problems, features, features)."""
    gram = moments.gram / max(moments.rows, 1)
    mean = gram[:, -1, :-1]
    return gram[:, :-1, :-1] - mean[:, :, None] * mean[:, None, :]


def eliminate(problems: list[Problem], units: int) -> tuple[list[int], list[float]]:
    """Backward elimination: the units in the order in which they go, and what each removal costs."""
    states = [_State.of(p) for p in problems]
    alive = torch.arange(units, device=problems[0].covariance.device)
    order: list[int] = []
    costs: list[float] = []
    while len(alive) > 1:
        price = sum(s.prices(alive) for s in states)
        assert isinstance(price, Tensor)
        count = max(1, len(alive) // _SHARE)
        cheapest = price.argsort(stable=True)[:count]
        going = alive[cheapest]
        order += going.tolist()
        costs += price[cheapest].tolist()
        for state in states:
            state.remove(going)
        left = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        left[cheapest] = False
        alive = alive[left]
    # what the last unit is worth: everything that is still explained
    last = sum(float(s.prices(alive).sum()) for s in states)
    return [*order, *alive.tolist()], [*costs, last]


@dataclasses.dataclass
class _State:
    """What is left of a problem: H^-1, W, where the features of each unit are now, and which have gone."""

    inverse: Tensor
    weights: Tensor
    features: Tensor
    energy: float
    gone: Tensor

    @classmethod
    def of(cls, problem: Problem) -> _State:
        inverse = _inverse(problem.covariance)
        gone = torch.zeros(inverse.shape[1], dtype=torch.bool, device=inverse.device)
        return cls(inverse, problem.weights.clone(), problem.features.clone(), problem.energy, gone)

    def prices(self, units: Tensor) -> Tensor:
        return _prices(self.inverse, self.weights, self.features[units]) / self.energy

    def remove(self, units: Tensor) -> None:
        features = self.features[units].flatten()
        _remove(self.inverse, self.weights, features)
        self.gone[features] = True
        self.features[units] = 0
        if int(self.gone.sum()) * 8 > len(self.gone):
            self._shrink()

    def _shrink(self) -> None:
        """Leave out the rows and columns of what went."""
        kept = ~self.gone
        self.features = (kept.cumsum(0) - 1)[self.features].clamp_min(0)  # of units that went, never used
        self.inverse, self.weights = self.inverse[:, kept][:, :, kept], self.weights[:, kept]
        self.gone = self.gone[kept]


def _inverse(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if bool(info.any()) else torch.cholesky_inverse(factor)


def _prices(inverse: Tensor, weights: Tensor, features: Tensor) -> Tensor:
    """tr(W_u' (H^-1)_uu^-1 W_u) for each row u of `features`, summed over problems."""
    rows = weights[:, features]  # (problems, units, k, outputs)
    if features.shape[1] == 1:  # a division each, where small systems would take their time
        single = features[:, 0]
        diagonal = inverse.diagonal(dim1=1, dim2=2)[:, single]
        return (rows.square().sum((2, 3)) / diagonal).sum(0)
    blocks = inverse[:, features[:, :, None], features[:, None, :]]  # (problems, units, k, k)
    price: Tensor = (rows * torch.linalg.solve(blocks, rows)).sum((0, 2, 3))
    return price


def _remove(inverse: Tensor, weights: Tensor, features: Tensor) -> None:
    """Change H^-1 and W, in place, to what they are after these features went and the others took over. What went is
    left zero, with a unit diagonal."""
    columns = inverse[:, :, features]
    both = torch.cat([columns.mT, weights[:, features]], 2)
    solved = torch.linalg.solve(columns[:, features], both)  # (problems, k, features + outputs)
    size = inverse.shape[1]
    inverse.baddbmm_(columns, solved[:, :, :size], alpha=-1)
    weights.baddbmm_(columns, solved[:, :, size:], alpha=-1)
    inverse[:, features] = 0
    inverse[:, :, features] = 0
    inverse[:, features, features] = 1
    weights[:, features] = 0
