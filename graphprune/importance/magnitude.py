"""Worth by the size of the weights: "l1", "l2" and "lamp"; "l1_folded" and so on with batch norms folded in first."""

from __future__ import annotations

import numpy as np

from ..dependency.groups import Group, Member
from .context import Floats, ImportanceContext
from .registry import criterion, reduced

_RUNNING_STATISTICS = ("running_mean", "running_var")


def judged_members(context: ImportanceContext, group: Group) -> list[Member]:
    """The members by whose weights a group is judged, the first of these that exists:

    the tensors that produce the channels (role "out", at least two axes: filters, rows of a Linear); the tensors that
    consume them ("in"); everything else ("vector", "other": scales, biases, embeddings) but running statistics, which
    say how large a channel's values are and not what they are worth. Empty for a group without any of them.
    """
    out = [m for m in context.members(group, ("out",)) if context.tensors[m.parameter].dim() >= 2]
    if out:
        return out
    consumers = context.members(group, ("in",))
    if consumers:
        return consumers
    rest = context.members(group, ("vector", "other", "out"))
    return [m for m in rest if m.parameter.rpartition(".")[2] not in _RUNNING_STATISTICS]


def over_members(group: Group, vectors: list[Floats]) -> Floats:
    """One score per unit from one vector (group.size,) per member: their mean, or what `with_options` asked for; all
    ones where there is no member to judge by."""
    if not vectors:
        return np.ones(group.size)
    return reduced(np.stack(vectors))


def mean_norm(context: ImportanceContext, group: Group, p: float) -> Floats:
    """Mean over `judged_members` of the p-norm of each unit's weights, shape (group.size,).

    A plain mean: where several layers feed one residual stream, a layer with large filters speaks louder, as its
    output does in the sum. A unit of k channels (a head) is judged by the norm of all its weights together.
    """
    return over_members(group, [context.norm(member, p) for member in judged_members(context, group)])


@criterion("l1")
def l1(context: ImportanceContext, group: Group) -> Floats:
    """Sum of absolute weights of each filter (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).

    Mean over the layers that produce the channels; see `judged_members` for groups without one. Grows with the filter:
    `normalise` before ranking across groups.
    """
    return mean_norm(context, group, 1)


@criterion("l2")
def l2(context: ImportanceContext, group: Group) -> Floats:
    """Euclidean norm of each filter (the L2 variant of Li et al., ICLR 2017). See `l1` for the rest."""
    return mean_norm(context, group, 2)


@criterion("lamp", comparable=True)
def lamp(context: ImportanceContext, group: Group) -> Floats:
    """Layer-adaptive magnitude (Lee et al., ICLR 2021): s_u^2 / sum of s_v^2 over all v ranked no lower than u.

    s is the "l2" score. A score is the share of a unit among those that would be left if units went in this order, and
    so comparable across groups as it is; the best unit of a group always has 1 and goes last. Of units with equal
    s the lower index ranks higher. A unit of zeros scores 0.
    """
    return lamp_scores(mean_norm(context, group, 2))


for _name, _function, _comparable in (("l1", l1, False), ("l2", l2, False), ("lamp", lamp, True)):
    criterion(f"{_name}_folded", comparable=_comparable, folded=True)(_function)


def lamp_scores(magnitudes: Floats) -> Floats:
    """The formula of `lamp` on magnitudes of shape (units,), none negative."""
    top = float(magnitudes.max(initial=0.0))
    if top == 0.0:
        return np.zeros_like(magnitudes)
    squares = np.square(magnitudes / top)  # scaled: no square leaves the range of a float
    order = np.argsort(-squares, kind="stable")
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.cumsum(squares[order])
    return scores
