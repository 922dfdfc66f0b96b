"""Which groups are meant by kind: whole heads, channels that convolutions make, or whichever are best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...dependency import DependencyGraph, Group, GroupKind

FEATURES = tuple(kind for kind in GroupKind if kind.is_feature)
CHANNELS = tuple(kind for kind in GroupKind if not kind.is_head and not kind.is_feature)


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Kinds of groups.

    `names`: all groups of these kinds; `makers`: channels that only weights of so many axes make, from - to. Without
    both ("auto") every axis is cut along one of its factors, whichever is best.
    """

    names: frozenset[GroupKind] = frozenset()
    makers: frozenset[tuple[int, int]] = frozenset()

    def __or__(self, other: Kinds) -> Kinds:
        """Groups of either; of two that are not "auto"."""
        return Kinds(self.names | other.names, self.makers | other.makers)

    @property
    def auto(self) -> bool:
        """Whether the groups are chosen by what is best."""
        return not self.names and not self.makers

    def may_change(self, kind: GroupKind) -> bool:
        """Whether groups of this kind may change to make others come out right."""
        if self.auto or kind in self.names or (bool(self.makers) and kind in CHANNELS):
            return True
        return kind is GroupKind.HEAD_FEATURE and self.names.issuperset((GroupKind.QK_FEATURE, GroupKind.V_FEATURE))

    @property
    def apart(self) -> bool:
        """Whether the features of queries and keys, or those of values, are asked for without the others: then they
        need not stay equally wide."""
        return len(self.names & set(FEATURES)) == 1 and GroupKind.HEAD_FEATURE not in self.names


def chosen_groups(graph: DependencyGraph, kinds: Kinds, loses: Sequence[bool] | None = None) -> list[bool]:
    """Which groups are meant.

    A stream that weights of different numbers of axes write is made by neither. "auto" cuts every axis along one of its
    factors: whole heads where they are free, else head features; channels inside the groups of a grouped convolution
    where there are at least four, else whole groups. `loses` says which groups would lose a unit if they were chosen:
    where no whole head would go, head features do. So they do where a mean over the heads would change (attention
    weights in the output), unless a norm runs over the features too.
    """
    groups = graph.groups
    if not kinds.auto:
        names = kinds.names | ({GroupKind.HEAD_FEATURE} if kinds.may_change(GroupKind.HEAD_FEATURE) else frozenset())
        made = [_made_by(graph, *axes) for axes in kinds.makers]
        return [g.kind in names or any(m[i] for m in made) for i, g in enumerate(groups)]
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
    for group, auto in zip(graph.groups, chosen_groups(graph, Kinds()), strict=True):
        axes = [len(graph.trace.parameters[m.parameter].meta["val"].shape) for m in group.members if m.role == "out"]
        producers = [n for n in axes if n > 1]
        fits = bool(producers) and all(least <= n <= most for n in producers)
        chosen.append(auto and fits and group.kind in CHANNELS)
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
