"""Worth by what the layers that read a channel would lose: "reconstruction"."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dependency.groups import Group, Member
from .calibration import Moments, weight_matrix
from .calibration.gradients import sensitivities
from .context import Floats, ImportanceContext
from .elimination import Elimination, Problem, Quadratic, Thin, Whole
from .in_context import Reading, measured_costs
from .magnitude import mean_norm
from .registry import criterion

# Ridge on the inputs' covariance, times its mean diagonal.
RIDGE = 1e-3
# The least scale of errors of a result, of the largest one: there are results that the outputs do not depend on.
_FAINT = 1e-6


@criterion("reconstruction", comparable=True, needs="inputs", folded=True)
def reconstruction(context: ImportanceContext, group: Group) -> Floats:
    """Squared error that the layers which read the channels cannot make up for, as they lose one unit after the other.

    Optimal brain surgeon (Hassibi & Stork, NIPS 1992) with whole units: with H the covariance of a layer's inputs and W
    its weights, removing unit u and refitting the rest costs tr(W_u' (H^-1)_uu^-1 W_u); the cheapest unit goes, W and
    H^-1 are updated, and so on until one is left (greedy; see `Elimination` for groups of 32 units and
    more). Errors of the layers' results are weighed by what they do to the network's outputs (`sensitivities`). A
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
    elimination = Elimination([_problem(context, reading) for reading in readings], group.size)
    if context.compared and group.size > 1:
        order, costs = measured_costs(context.calibration, readings, elimination, group.size)
    else:
        order, costs = elimination.finish()
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
    matrix = weight_matrix(reader, weight).to(torch.promote_types(weight.dtype, torch.float32))
    taps = matrix.shape[1] // weight.shape[reader.in_axis]
    positions = torch.from_numpy(member.positions.copy()).to(weight.device)
    features = (positions[:, :, None] * taps + torch.arange(taps, device=weight.device)).flatten(1)
    quadratic, mean = quadratic_of(moments)
    return Reading(reader, matrix, quadratic, mean, features)


def _problem(context: ImportanceContext, reading: Reading) -> Problem:
    """The weights, and scales of their outputs by which squared errors count by what they do to the network's outputs.
    Where the outputs do not depend on the layer through gradients, errors are relative to the variance of its results.
    """
    matrix, energy, scale = reading.matrix, 1.0, None
    found = context.calibration.cached(sensitivities).get(reading.reader.weight)
    if found is None or not bool(torch.isfinite(found).all()) or not float(found.sum()) > 0:
        wide = matrix.double()
        energy = float((wide * reading.quadratic.times(wide)).sum())
    else:
        root = found.sqrt()
        scale = root.clamp_min(_FAINT * float(root.max())).reshape(matrix.shape[0], 1, -1).to(matrix.dtype)
    return Problem(reading.quadratic, matrix, reading.features, max(energy, 1e-30), scale)


def quadratic_of(moments: Moments) -> tuple[Quadratic, Tensor]:
    """The covariance of the inputs per row, (problems, features, features), with the ridge on it, and their means."""
    few, rows = moments.few, max(moments.rows, 1)
    if few is not None:
        mean = few[0].mean(1)
        centred = (few[0] - mean[:, None]).div_(rows**0.5)
        return Thin(centred, _ridge(centred.square().sum(1).mean(1))), mean
    mean = moments.gram[:, -1, :-1] / rows
    covariance = moments.gram[:, :-1, :-1] / rows
    covariance.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    diagonal += _ridge(diagonal.mean(1))[:, 0]
    return Whole(covariance), mean


def _ridge(mean: Tensor) -> Tensor:
    """What is added to the diagonal, whose mean is given: (problems, 1, 1)."""
    return (RIDGE * mean).clamp_min(1e-30)[:, None, None]
