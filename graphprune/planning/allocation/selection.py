"""Which groups a request speaks of: ratios by name or pattern, ignored modules, granularity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ...dependency import DependencyGraph, Group, GroupKind, Reason
from ...errors import GraphPruneError
from ...support.suggestions import check_choice
from ...support.types import Ignore
from ...tracing.matching import NameTable, items_of

_FEATURES = tuple(kind for kind in GroupKind if kind.is_feature)
_CHANNELS = tuple(kind for kind in GroupKind if not kind.is_head and not kind.is_feature)
GRANULARITIES: dict[str, tuple[GroupKind, ...]] = {
    "channels": _CHANNELS,
    "mlp": (GroupKind.MLP_CHANNEL,),
    "embedding": (GroupKind.RESIDUAL_CHANNEL, GroupKind.EMBEDDING_CHANNEL),
    "heads": (GroupKind.HEAD,),
    "head features": _FEATURES,
    "qk features": (GroupKind.QK_FEATURE,),
    "v features": (GroupKind.V_FEATURE,),
}
_ALIASES = {"channel": "channels", "head": "heads", "head feature": "head features"}

# Textbook names for channels by what makes them: rows of 2-D weights, filters of weights with kernels.
_PRODUCERS = {"neuron": (2, 2), "neurons": (2, 2), "filter": (3, 5), "filters": (3, 5)}


def module_of(parameter: str) -> str:
    """The path of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def check_ratio(value: Any, where: str = "ratio") -> float:
    """A fraction of channels to remove, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 <= float(value) < 1:
        raise GraphPruneError(
            f"{where}: expected a number in [0, 1), the fraction of channels to remove; got {value!r}"
        )
    return float(value)


def matching_ratios(ratio: float | Mapping[str, float], graph: DependencyGraph) -> list[float]:
    """The ratio of every group, by the names and patterns that mean a parameter producing it (`winners`); 0 where none
    does."""
    if not isinstance(ratio, Mapping):
        return [check_ratio(ratio)] * len(graph.groups)
    patterns = {str(p): check_ratio(r, f"ratio[{p!r}]") for p, r in ratio.items()}
    if not patterns:
        raise GraphPruneError("ratio: the dict is empty; map names of modules, or patterns, to fractions")
    return [0.0 if pattern is None else patterns[pattern] for pattern in winners(patterns, graph)]


def names_in(graph: DependencyGraph) -> NameTable:
    """The names of the network that was recorded."""
    return NameTable({path: path for path in graph.trace.modules}, graph.trace.aliases)


def winners(patterns: Iterable[str], graph: DependencyGraph) -> list[str | None]:
    """For every group the pattern that counts for what produces it, of several parameters the one that matches best
    (`NameTable.ranked`); None where none does."""
    ranked = names_in(graph).ranked(patterns, "ratio")
    found = ([ranked[name] for name in names if name in ranked] for names in producers(graph))
    return [max(ranks)[1] if ranks else None for ranks in found]


def producers(graph: DependencyGraph) -> list[list[str]]:
    """For every group the parameters that produce its channels, under all their names."""
    aliases: dict[str, list[str]] = {}
    for name, first in graph.trace.aliases.items():
        aliases.setdefault(first, []).append(name)
    out = []
    for group in graph.groups:
        makers = [m for m in group.members if m.role == "out"] or list(group.members)
        out.append([name for m in makers for name in aliases.get(m.parameter, [m.parameter])])
    return out


def ignored_positions(
    ignore: Ignore, graph: DependencyGraph, model: nn.Module
) -> list[tuple[Any, Reason]]:
    """The outputs of ignored modules and parameters, as positions to freeze."""
    items = items_of(ignore, "ignore")
    if not items:
        return []
    names, analysis, roles = NameTable.of(model), graph.analysis, graph.roles
    out = []
    for item in items:
        meant = names.meant(item, "ignore")
        firsts: dict[str, str] = {}
        for name, first in graph.trace.aliases.items():
            if name in meant and first in graph.trace.parameters:
                firsts.setdefault(first, name)
        for first, name in firsts.items():
            reason = Reason("ignored", f"{item if isinstance(item, str) else name} is ignored")
            for axis in range(len(graph.trace.parameters[first].meta["val"].shape)):
                if (first, axis) in analysis.dims.roots and roles[(first, axis)] != "in":
                    out += [(analysis.dims.positions(d), reason) for d in analysis.dims.roots[(first, axis)]]
    return out


def kinds_of(granularity: str | Sequence[str]) -> frozenset[GroupKind] | None:
    """The kinds of groups that a granularity speaks of; None for "auto"."""
    if granularity == "auto":
        return None
    kinds: set[GroupKind] = set()
    for name in [granularity] if isinstance(granularity, str) else granularity:
        plain = str(name).replace("_", " ")
        found = _CHANNELS if name in _PRODUCERS else GRANULARITIES.get(_ALIASES.get(plain, plain))
        if found is None:
            check_choice("granularity", name, (*GRANULARITIES, "filters", "neurons"), "'auto' alone")
        else:
            kinds.update(found)
    if kinds.issuperset((GroupKind.QK_FEATURE, GroupKind.V_FEATURE)):
        kinds.add(GroupKind.HEAD_FEATURE)
    return frozenset(kinds)


def apart(granularity: str | Sequence[str]) -> bool:
    """Whether the features of queries and keys, or those of values, are asked for without the others: then they need
    not stay equally wide."""
    kinds = kinds_of(granularity)
    return kinds is not None and GroupKind.HEAD_FEATURE not in kinds and len(kinds & set(_FEATURES)) == 1


def chosen_groups(
    graph: DependencyGraph, granularity: str | Sequence[str], loses: Sequence[bool] | None = None
) -> list[bool]:
    """Which groups a granularity speaks of.

    "filters" are channels made by convolutions alone, "neurons" those made by linear layers alone; a stream that both
    write is neither. "auto" (the default) cuts every axis along one of its factors: whole heads where they are free,
    else head features; channels inside the groups of a grouped convolution where there are at least four, else whole
    groups. `loses` says which groups would lose a unit if they were chosen: where no whole head would go, head features
    do. So they do where a mean over the heads would change (attention weights in the output), unless a norm runs over
    the features too.
    """
    groups = graph.groups
    if granularity != "auto":
        names = [granularity] if isinstance(granularity, str) else list(granularity)
        kinds = kinds_of([name for name in names if name not in _PRODUCERS]) or frozenset()
        made = [_made_by(graph, *_PRODUCERS[name]) for name in names if name in _PRODUCERS]
        return [g.kind in kinds or any(m[i] for m in made) for i, g in enumerate(groups)]
    # An axis that only one group lies on needs no looking at: only one of several groups can meet another.
    shared: dict[tuple[str, int], int] = {}
    for group in groups:
        for m in group.members:
            shared[(m.parameter, m.axis)] = shared.get((m.parameter, m.axis), 0) + 1
    taken: dict[tuple[str, int], np.ndarray] = {}
    chosen = [False] * len(groups)
    harmless = _harmless(graph)

    def order(group: Group) -> tuple[int, int]:
        return _preference(group, loses is None or loses[group.index], harmless[group.index]), group.index

    for group in sorted(groups, key=order):
        members = [m for m in group.members if shared[(m.parameter, m.axis)] > 1]
        for m in members:
            if (m.parameter, m.axis) not in taken:
                length = graph.trace.parameters[m.parameter].meta["val"].shape[m.axis]
                taken[(m.parameter, m.axis)] = np.zeros(length, bool)
        if not any(taken[(m.parameter, m.axis)][m.positions].any() for m in members):
            chosen[group.index] = True
            for m in members:
                taken[(m.parameter, m.axis)][m.positions] = True
    return chosen


def _made_by(graph: DependencyGraph, least: int, most: int) -> list[bool]:
    """Which channels, of those that "auto" cuts, are made only by weights with that many axes."""
    chosen = []
    for group, auto in zip(graph.groups, chosen_groups(graph, "auto"), strict=True):
        axes = [len(graph.trace.parameters[m.parameter].meta["val"].shape) for m in group.members if m.role == "out"]
        producers = [n for n in axes if n > 1]
        fits = bool(producers) and all(least <= n <= most for n in producers)
        chosen.append(auto and fits and group.kind in _CHANNELS)
    return chosen


def _harmless(graph: DependencyGraph) -> list[bool]:
    """Which groups no mean, norm or softmax runs over; and heads where one runs over their features anyway."""
    averaged = graph.analysis.components_of(p for e in graph.analysis.effects.values() for p in e.statistics)
    touched = [bool(averaged[graph.units(group)].any()) for group in graph.groups]
    normed = {
        (m.parameter, m.axis) for g in graph.groups if g.kind.is_feature and touched[g.index] for m in g.members
    }
    return [
        not touched[g.index] or (g.kind.is_head and any((m.parameter, m.axis) in normed for m in g.members))
        for g in graph.groups
    ]


def _preference(group: Group, loses: bool, harmless: bool) -> int:
    if group.kind.is_head:
        return (0 if harmless else 2) if loses else 4
    if group.kind.is_feature:
        return 1 if harmless else 3
    if group.kind is GroupKind.GROUP_CHANNEL:
        return 0 if group.size >= 4 else 2
    return 1 if group.kind is GroupKind.CONV_GROUP else 0
