"""Worth by what the loss would do: "taylor", "taylor_gate", "fisher", "hessian"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dependency.groups import Group, Member
from .calibration.gradients import gate_products, squared_gradients, weight_gradients
from .context import Floats, ImportanceContext
from .magnitude import judged_members, mean_norm, over_members
from .registry import criterion


@criterion("taylor", comparable=True, needs="loss", folded=True)
def taylor(context: ImportanceContext, group: Group) -> Floats:
    """|sum of w dL/dw| over each unit's weights: the first-order change of the loss when the unit goes (Molchanov et
    al., Importance Estimation for Neural Network Pruning, CVPR 2019, weight form).

    L is the mean loss over all samples. Mean over the layers that produce the channels, biases included with their
    layer's weight only where they are members. Comparable across groups as it is.
    """
    gradients = context.calibration.cached(weight_gradients)
    return _over_weights(context, group, lambda n: gradients[n] * _value(context, n) if n in gradients else None, abs)


@criterion("hessian", comparable=True, needs="loss", folded=True)
def hessian(context: ImportanceContext, group: Group) -> Floats:
    """Sum of w^2 h / 2 over each unit's weights: the second-order change of the loss (LeCun, Denker & Solla, Optimal
    Brain Damage, NIPS 1989), with the diagonal of the empirical Fisher information, mean over samples of (dL/dw)^2, for
    the Hessian's. One backward pass per sample. Mean over layers as in "taylor"."""
    squares = context.calibration.cached(squared_gradients)
    return _over_weights(
        context, group, lambda n: squares[n] * _value(context, n).square() / 2 if n in squares else None, abs
    )


@criterion("taylor_gate", comparable=True, needs="loss", folded=True)
def taylor_gate(context: ImportanceContext, group: Group) -> Floats:
    """Mean over samples of |dL/dz|, z a factor on all that the unit passes on (Molchanov et al., CVPR 2019, gate form;
    ICLR 2017): activation times gradient, summed over positions and over the layers that read the unit.

    A unit that no linear layer or convolution reads scores by "taylor".
    """
    products = _gates(context, group)
    return taylor(context, group) if products is None else products.abs().mean(0).cpu().numpy()


@criterion("fisher", comparable=True, needs="loss", folded=True)
def fisher(context: ImportanceContext, group: Group) -> Floats:
    """Half the mean over samples of (dL/dz)^2, z as in "taylor_gate" (Theis et al., Faster gaze prediction with dense
    networks and Fisher pruning, 2018). A unit that no linear layer or convolution reads scores by "hessian"."""
    products = _gates(context, group)
    return hessian(context, group) if products is None else (products.square().mean(0) / 2).cpu().numpy()


def _value(context: ImportanceContext, name: str) -> Tensor:
    return context.calibration.weights[name].detach().double()


def _over_weights(
    context: ImportanceContext, group: Group, product: Callable[[str], Tensor | None], final: Callable[[Floats], Floats]
) -> Floats:
    vectors = []
    for member in judged_members(context, group):
        values = product(member.parameter)
        if values is not None:
            vectors.append(final(_per_unit(values, member)))
    return over_members(group, vectors) if vectors else mean_norm(context, group, 2) * 0


def _per_unit(values: Tensor, member: Member) -> Floats:
    summed = values.movedim(member.axis, 0).flatten(1).sum(1).cpu().numpy()
    out: Floats = summed[member.positions].sum(axis=1)
    return out


def _gates(context: ImportanceContext, group: Group) -> Tensor | None:
    """(samples, units): the derivatives by each unit's factor."""
    products = context.calibration.cached(gate_products)
    parts = []
    for member in context.members(group, ("in",)):
        reader = context.calibration.readers.get(member.parameter)
        if reader is None or reader.in_axis != member.axis or member.parameter not in products:
            continue
        parts.append(by_units(products[member.parameter], reader.groups, reader.transposed, member))
    return torch.stack(parts).sum(0) if parts else None


def by_units(values: Tensor, groups: int, transposed: bool, member: Member) -> Tensor:
    """Sums over each unit's channels of (..., channels) values; (..., units)."""
    positions = torch.from_numpy(member.positions.copy()).to(values.device)
    if groups > 1 and not transposed:  # the weight's axis counts inside one group
        values = values.reshape(*values.shape[:-1], groups, -1).sum(-2)
    return values[..., positions].sum(-1)
