"""Turn scores into a number of units to keep per group, under the constraints, and into the units themselves."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from .averaging import macs_by_group
from .budget import Limit
from .cells import Allocation
from .kinds import chosen_groups
from .realising import realise
from .rounding import Ints, lost
from .selection import matching_ratios
from .settings import Settings
from .within import within


def allocate(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int] | None = None,
    limits: Sequence[Limit] = (),
    possible: Mapping[int, Ints] | None = None,
) -> Allocation:
    """Decide what goes. `scores[g]` holds one score per unit of group g (higher stays; on one scale for
    all groups unless the scope is local); `forced[g]` fixes how many units of a group stay. With `limits`, widths are
    chosen so that these costs are kept, and ratios are not looked at; `possible[g]`: the only widths that group g may
    have then.

    Raises GraphPruneError for limits that cannot be met."""
    forced = forced or {}
    weights = macs_by_group(graph)
    if limits:
        chosen = chosen_groups(graph, settings.kinds)
        return within(graph, scores, settings, forced, limits, chosen, weights, possible or {})
    assert settings.ratio is not None
    asked = matching_ratios(settings.ratio, graph)
    chosen = chosen_groups(graph, settings.kinds, _losing(graph, asked, settings))
    ratios = [r if c else 0.0 for r, c in zip(asked, chosen, strict=True)]
    wanted = _asked_per_group(graph, scores, ratios, settings.scope)
    keep = _keep_per_group(graph, wanted, ratios, settings)
    made = realise(graph, scores, settings, forced, keep, ratios, weights)
    shares = {i: wanted[i] for i, ratio in enumerate(ratios) if ratio}
    return dataclasses.replace(made, asked=shares, weights=weights)


def _losing(graph: DependencyGraph, ratios: Sequence[float], settings: Settings) -> list[bool] | None:
    """Which groups a ratio takes a unit from; None where the choice must stay the same from step to step."""
    if settings.steady:
        return None
    return [
        settings.rounding.alone(g.size - lost(ratios[g.index], g.size), g.size) < g.size or not ratios[g.index]
        for g in graph.groups
    ]


def _asked_per_group(
    graph: DependencyGraph, scores: Mapping[int, Floats], ratios: Sequence[float], scope: str
) -> list[float]:
    """How many units of each group should stay, before any rounding of widths."""
    groups = graph.groups
    if scope == "local":
        return [g.size - ratios[g.index] * g.size for g in groups]
    pools: dict[tuple[float, str], list[int]] = defaultdict(list)
    for g in groups:
        if ratios[g.index]:
            pools[(ratios[g.index], g.structure if scope == "isomorphic" else "")].append(g.index)
    keep = [float(g.size) for g in groups]
    for (ratio, _), indices in pools.items():
        flat = np.concatenate([scores[i] for i in indices])
        owner = np.repeat(indices, [groups[i].size for i in indices])
        drop = np.argsort(flat, kind="stable")[: lost(ratio, len(flat))]
        gone = np.bincount(owner[drop], minlength=len(groups))
        for i in indices:
            keep[i] -= int(gone[i])
    return keep


def _keep_per_group(
    graph: DependencyGraph, asked: Sequence[float], ratios: Sequence[float], settings: Settings
) -> list[float]:
    """What is asked, rounded group by group; under "auto" as it is, since that rounds all groups together later."""
    if settings.rounding.auto:
        return list(asked)
    keep: list[float] = []
    for g in graph.groups:
        gone = lost(ratios[g.index], g.size) if settings.scope == "local" else g.size - int(asked[g.index])
        keep.append(settings.rounding.alone(g.size - gone, g.size) if ratios[g.index] else g.size)
    return keep
