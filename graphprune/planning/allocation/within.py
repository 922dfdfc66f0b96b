"""Widths that keep a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from ...errors import GraphPruneError
from .budget import Limit, UnreachableBudget, Widths
from .cells import Allocation
from .realising import realise
from .rounding import Ints
from .settings import Settings
from .staircase import StairWidths

# The widths are chosen for a scaled limit and then changed by the constraints of the code. Rounds in which the scale is
# searched, how much of the limit used is near enough, and the scale from which on raising it changes nothing.
_ROUNDS, _NEAR, _FREE = 24, 0.995, 4.0
# A limit that is used less is not met: then finer widths are tried.
_MET = 0.99


def within(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    limits: Sequence[Limit],
    chosen: Sequence[bool],
    weights: Floats,
    possible: Mapping[int, Ints],
) -> Allocation:
    """Widths within the limits: what equal counts and shared indices add is found out exactly, and taken off.

    Under "auto" a small network may have no such widths that use what is allowed; then finer ones are taken."""
    best: _Found | None = None
    finer = settings.rounding.finer
    for rounding in finer:
        stepped = dataclasses.replace(settings, rounding=rounding)
        try:
            last = len(finer) == 1 or not rounding.auto
            found = _searched(graph, scores, stepped, forced, limits, chosen, weights, possible, last)
        except UnreachableBudget:
            if best is None and rounding is finer[-1]:
                raise
            continue
        if found is not None and (best is None or found.used > best.used):
            best = found
        if best is not None and best.used >= _MET:
            break
    if best is None:
        names = " and ".join(limit.name for limit in limits)
        raise UnreachableBudget(
            f"budget: no widths were found that keep {names} within the budget and obey the equal-count constraints of "
            f"this model; raise the budget or lower min_channels"
        )
    return best.allocation


@dataclasses.dataclass(frozen=True)
class _Found:
    """`used`: the largest share of a limit. `kept`: minus the score that goes."""

    allocation: Allocation
    used: float
    kept: float


def _searched(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    limits: Sequence[Limit],
    chosen: Sequence[bool],
    weights: Floats,
    possible: Mapping[int, Ints],
    last: bool,
) -> _Found | None:
    """What fits of the widths chosen for limits of several scales: the one that keeps most where widths have steps,
    between which there may be no way to use more, else the one that uses most. `last`: no widths are so much finer that
    score need not be given up to meet a limit."""
    groups = graph.groups
    rounding = settings.rounding
    allowed = [rounding.allowed(g.size, g.kind) for g in groups]
    for index, widths in possible.items():
        allowed[index] = np.union1d(np.intersect1d(allowed[index], widths), [groups[index].size])
    floors, ceilings = [], []
    for group in groups:
        ceilings.append(forced.get(group.index, group.size))
        free = chosen[group.index] and group.index not in forced
        floors.append(rounding.narrowest(group.size, allowed[group.index]) if free else ceilings[-1])
    stairs = any(limit.stairs is not None for limit in limits)
    worth = [scores[g.index] for g in groups]
    chooser = (
        StairWidths(worth, floors, ceilings, allowed) if stairs else Widths(worth, floors, ceilings, allowed, last)
    )
    steps = stairs or rounding.steps
    best: _Found | None = None
    scale, fits, exceeds = 1.0, 0.0, math.inf
    for _ in range(_ROUNDS):
        try:
            wanted = chooser.choose(limits, scale)
        except GraphPruneError:
            if best is None and scale >= 1:
                raise  # not even the floors fit
            fits, scale = max(fits, scale), (scale + min(exceeds, _FREE)) / 2
            continue
        made = realise(graph, scores, settings, forced, wanted.tolist(), None, weights)
        used = max(limit.cost.exact(made.gone) / limit.most for limit in limits)
        if used <= 1 + 1e-12:
            fits = scale
            new = _Found(made, used, -sum(float(scores[g][lost].sum()) for g, lost in made.removed.items()))
            if best is None or (new.kept > best.kept if steps else used > best.used):
                best = new
            exact = steps and all(g.size - len(made.removed.get(g.index, ())) == wanted[g.index] for g in groups)
            if used >= _NEAR or scale >= _FREE or exact:
                break
        else:
            exceeds = scale
        scale = min(scale / used, _FREE) if fits == 0 or math.isinf(exceeds) else (fits + exceeds) / 2
    return best
