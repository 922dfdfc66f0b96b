"""What a blocker holds, found the slow way: one index, one reason and one parameter element at a time."""

from __future__ import annotations

import itertools

import numpy as np
from torch import nn

from graphprune.dependency import DependencyGraph, Reason

Key = tuple[str, str, str]


def key_of(reason: Reason) -> Key:
    return reason.kind, reason.text, str(reason.source or "")


def holders(graph: DependencyGraph, name: str, axis: int, index: int) -> tuple[bool, set[Key]]:
    """Whether an index can go, and every reason that holds one of its coordinates."""
    analysis = graph.analysis
    assert analysis.tied is not None
    places = {
        analysis.dims.offset[d] + int(v[index])
        for d, v in analysis.dims.roots.get((name, axis), {}).items()
        if v[index] >= 0
    }
    tied = {int(analysis.tied[p]): p for p in places}
    found: dict[int, set[Key]] = {t: set() for t in tied}
    kinds: dict[int, set[str]] = {t: set() for t in tied}
    for positions, reason in analysis.freezes:
        for component in set(analysis.tied[positions].tolist()) & set(tied):
            found[component].add(key_of(reason))
            kinds[component].add(reason.kind)
    free = any(not reasons for reasons in found.values())
    plain = [t for t in tied if "selected" not in kinds[t]]
    return free, set().union(*(found[t] for t in (plain or tied)))


def costs(model: nn.Module, graph: DependencyGraph) -> tuple[int, dict[Key, int]]:
    """Parameters on channels that can go, and parameters in the slices of each reason."""
    movable, held = 0, dict[Key, int]()
    for name, parameter in model.named_parameters():
        if name not in graph.trace.parameters:
            continue
        axes = [[holders(graph, name, a, i) for i in range(n)] for a, n in enumerate(parameter.shape)]
        masks: dict[Key | None, np.ndarray] = {}
        for place in itertools.product(*map(range, parameter.shape)):
            on = [axes[a][i] for a, i in enumerate(place)]
            keys = {k for free, reasons in on if not free for k in reasons}
            keys |= {None} if any(free for free, _ in on) else set()  # type: ignore[arg-type]
            for key in keys:
                masks.setdefault(key, np.zeros(parameter.shape, bool))[place] = True
        for key, mask in masks.items():
            if key is None:
                movable += int(mask.sum())
            else:
                held[key] = held.get(key, 0) + int(mask.sum())
    return movable, held
