"""Worth by what flows through a unit, from weights and stored statistics: "flow"."""

from __future__ import annotations

import numpy as np

from ..dependency.groups import Group, Member
from .context import Floats, ImportanceContext
from .magnitude import judged_members
from .registry import criterion

_SHORT = 0.1


@criterion("flow", comparable=True)
def flow(context: ImportanceContext, group: Group) -> Floats:
    """How much of what each next layer reads comes through a unit: sd(x) |w|^2, as a share of the layer's sum.

    |w|^2: the squared weights with which a layer reads the unit's channels; sd(x): their standard deviations, from the
    statistics that batch norms store, carried through what lies between. Where nothing is stored it is 1, less for
    filters that are shorter than a tenth of their layer's (a filter of zeros passes nothing on), and times the size of
    parameters and buffers that only multiply the unit (scales, masks). Shares are summed
    over the layers that read the group: a residual stream that ten layers read weighs as much as ten groups that one
    layer reads each, so that scores compare across groups as they are. A group that no linear layer or convolution
    reads is judged by its own squared weights, as if one layer read it.

    The default: chosen by an experiment on trained networks (docs/criteria.md).
    """
    alive = _alive(context, group) * _scaled(context, group)
    read = [_read(context, member, alive) for member in context.members(group, ("in",))]
    if not read:
        read = [context.squares(member).sum(1) for member in judged_members(context, group)]
        read = [np.mean([_share(energy) for energy in read], 0)] if read else [np.ones(group.size)]
    scores: Floats = np.sum([_share(energy) for energy in read], 0)
    return scores


def _alive(context: ImportanceContext, group: Group) -> Floats:
    """10 |filter|, relative to the root mean square of its layer, and at most 1."""
    filters = [m for m in context.members(group, ("out",)) if context.tensors[m.parameter].dim() > 1]
    made = [context.squares(m).sum(1) for m in filters]
    relative = [squares / squares.mean() for squares in made if squares.any()]
    alive: Floats = np.minimum(1, np.sqrt(np.mean(relative, 0)) / _SHORT) if relative else np.ones(group.size)
    return alive


def _scaled(context: ImportanceContext, group: Group) -> Floats:
    """The product of the scales of each unit."""
    factors = context.factors
    scales = [m for m in context.members(group, ("vector",)) if m.parameter in factors] if factors else []
    sizes = [np.sqrt(context.squares(m).mean(1)) for m in scales]
    out: Floats = np.prod(sizes, 0) if sizes else np.ones(group.size)
    return out


def _read(context: ImportanceContext, member: Member, alive: Floats) -> Floats:
    """One number per unit."""
    squares, variance = context.squares(member), context.stored_variance(member.parameter)
    if variance is not None and len(variance) > int(member.positions.max()):
        deviations = np.sqrt(variance)[member.positions]
        if not np.isnan(deviations).any():
            known: Floats = (squares * deviations).sum(1)
            return known
    found: Floats = squares.sum(1) * alive
    return found


def _share(energy: Floats) -> Floats:
    total = float(energy.sum())
    shares: Floats = np.full(len(energy), 1 / len(energy)) if total == 0 else energy / total
    return shares  # NaN stays NaN, and is reported with the weights to blame
