"""From components of tied positions to groups of interchangeable units."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .analysis import Analysis
from .dims import Root
from .effects import Freeze, Reason
from .groups import Group, GroupKind, Ints, Member, Role
from .state import Mask, sealed
from .whole.streams import ChannelUses

_PLAIN = frozenset((GroupKind.CHANNEL,))


@dataclasses.dataclass(frozen=True, eq=False)
class _Entries:
    """Indices of parameter axes that can go: along axis `slots[slot].root`, `index` has a coordinate on the slot's Dim
    that belongs to component `label`. In graph order."""

    slots: list[tuple[Root, int]]
    slot: Ints
    index: Ints
    label: Ints


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A group with the component number of each of its units, and the number of the entry in which each is first seen,
    which rises."""

    group: Group
    units: Ints
    first: Ints


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """The groups of an analysis, in the order in which the network first uses their parameters. `uses` names them."""

    parts: tuple[Part, ...]
    uses: ChannelUses

    @classmethod
    def of(cls, analysis: Analysis, roles: Mapping[Root, Role]) -> Grouping:
        uses = ChannelUses(analysis)
        entries = _entries(analysis)
        return cls((), uses) if entries is None else cls(_parts(analysis, roles, entries, uses), uses)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(part.group for part in self.parts)

    def narrowed(self, analysis: Analysis) -> Grouping:
        """The groups of an analysis that holds more positions than theirs, and is the same otherwise: as `of` would
        find them. Units that are held leave; a group that loses nothing and keeps its number is the same object."""
        if not self.parts:
            return self
        stays = analysis.free()[np.concatenate([p.units for p in self.parts])]
        if stays.all():
            return self
        ends = np.cumsum([len(part.units) for part in self.parts]).tolist()
        masks = [stays[a:b] for a, b in itertools.pairwise([0, *ends])]
        both = zip(self.parts, masks, strict=True)
        left = [part if mask.all() else self._without(part, mask) for part, mask in both if mask.any()]
        left.sort(key=lambda part: int(part.first[0]))
        return Grouping(tuple(_numbered(part, number) for number, part in enumerate(left)), self.uses)

    def _without(self, part: Part, stays: Mask) -> Part:
        """The units of a group that stay. What its channels are for may be clearer now that others have left."""
        units = sealed(part.units[stays])
        members = tuple(dataclasses.replace(m, positions=sealed(m.positions[stays])) for m in part.group.members)
        kind = self.uses.kind(members, units) if part.group.kind.is_channel else part.group.kind
        return Part(_group(part.group.index, members, kind), units, part.first[stays])


def _numbered(part: Part, number: int) -> Part:
    if part.group.index == number:
        return part
    return dataclasses.replace(part, group=dataclasses.replace(part.group, index=number))


def unproduced(analysis: Analysis, roles: Mapping[Root, Role]) -> list[Freeze]:
    """Positions that only scale or shift - no weight produces them - are no channels (tokens, queries, pixels)."""
    made, scaled = list[int](), list[int]()
    for root, axis_map in analysis.dims.roots.items():
        (made if roles[root] in ("out", "in") else scaled).extend(axis_map)
    dims, label = analysis.dims, analysis.label
    produced = analysis.components_of([np.zeros(1, np.int64), dims.positions_of(made)])
    positions = dims.positions_of(scaled)
    lone = positions[~produced[label[positions]]]
    return [(lone, Reason("no channel", "no layer produces or reads these positions as channels"))] if len(lone) else []


def _parts(
    analysis: Analysis, roles: Mapping[Root, Role], entries: _Entries, uses: ChannelUses
) -> tuple[Part, ...]:
    """All groups of removable units. Of repeated indices the one seen first counts, walking the axes in graph order."""
    label, components = entries.label, analysis.components
    first = np.full(components, len(label))
    first[label[::-1]] = np.arange(len(label))[::-1]  # the last one written wins
    used = np.flatnonzero(first < len(label))
    _, at, cluster = np.unique(_signature(analysis, entries)[used], return_index=True, return_inverse=True)
    earliest = np.full(len(at), len(label))
    np.minimum.at(earliest, cluster, first[used])
    rank = np.empty(len(at), np.int64)
    rank[np.argsort(earliest)] = np.arange(len(at))
    sorting = np.lexsort((first[used], rank[cluster]))
    by_group = used[sorting]
    starts = np.searchsorted(rank[cluster[sorting]], np.arange(len(at)))
    unit = np.arange(len(by_group))
    sizes = np.diff(starts, append=len(by_group))
    group_of, unit_of = np.empty(components, np.int64), np.empty(components, np.int64)
    group_of[by_group] = np.repeat(np.arange(len(at)), sizes)
    unit_of[by_group] = unit - np.repeat(starts, sizes)
    members = _members(roles, entries, group_of[label], unit_of[label], sizes)
    kinds = _kinds(analysis)
    parts = []
    for number, (found, units, seen) in enumerate(
        zip(members, _cut(sealed(by_group), starts), _cut(first[by_group], starts), strict=True)
    ):
        mine = [member for _, member in found]
        kind = _kind({k for dim, _ in found for k in kinds.get(dim, _PLAIN)}, uses, mine, units)
        parts.append(Part(_group(number, tuple(mine), kind), units, seen))
    return tuple(parts)


def _signature(analysis: Analysis, entries: _Entries) -> npt.NDArray[np.uint64]:
    """A hash per component of which axes it touches how often and how they are treated: equal hashes mean
    interchangeable units."""
    keys = np.random.default_rng(0).integers(1, 2**63, len(entries.slots), dtype=np.uint64)
    out = np.zeros(analysis.components, np.uint64)
    np.add.at(out, entries.label, keys[entries.slot])
    return out + _treatment(analysis)


def _cut(flat: Ints, starts: Ints) -> list[Ints]:
    """The runs that begin at `starts`."""
    return [flat[a:b] for a, b in itertools.pairwise([*starts.tolist(), len(flat)])]


def _entries(analysis: Analysis) -> _Entries | None:
    """Every index of every parameter axis that can go, as flat arrays; None where nothing can."""
    layout, label = analysis.dims.layout(), analysis.label
    labels = label[layout.position]
    free = np.flatnonzero(labels != label[0])
    if not len(free):
        return None
    slots = [(layout.roots[k], dim) for k, dim in layout.slots]
    return _Entries(slots, layout.slot[free], layout.index[free], labels[free])


def _treatment(analysis: Analysis) -> npt.NDArray[np.uint64]:
    """A hash per component of the parts of axes it lies in, where code treats parts of an axis differently."""
    out = np.zeros(analysis.components, np.uint64)
    rng = np.random.default_rng(1)
    label, dims = analysis.label, analysis.dims
    parts = [block for constraint in analysis.equal if constraint.apart for block in constraint.blocks]
    for site in analysis.sites:
        if site.span is not None and site.axis_map:
            inside = [dims.positions(d, v[slice(*site.span)]) for d, v in site.axis_map.items()]
            parts.append(np.concatenate(inside))
    for positions in parts:
        labels, n = np.unique(label[positions], return_counts=True)
        out[labels] += n.astype(np.uint64) * rng.integers(1, 2**63, dtype=np.uint64)
    return out


def _members(
    roles: Mapping[Root, Role], entries: _Entries, group: Ints, unit: Ints, sizes: Ints
) -> list[list[tuple[int, Member]]]:
    """For each group its members, one for each axis and Dim that it has units on, with the Dim; `group` and `unit` say
    where each entry belongs."""
    place, index = group * len(entries.slots) + entries.slot, entries.index
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    if len(np.unique(place[starts])) < len(starts):  # entries of a group lie apart on an axis
        sorting = np.argsort(place, kind="stable")
        place, index, unit = place[sorting], index[sorting], unit[sorting]
        starts = np.flatnonzero(np.diff(place, prepend=-1))
    index = sealed(index)
    falls = np.concatenate([unit[1:] < unit[:-1], [False]])
    falls[starts[1:] - 1] = False
    mixed = np.logical_or.reduceat(falls, starts).tolist()  # units do not come in their order
    found: list[list[tuple[int, Member]]] = [[] for _ in sizes]
    count = sizes.tolist()
    wheres, pieces, units = place[starts], _cut(index, starts), _cut(unit, starts)
    for run in np.argsort(wheres).tolist():
        g, slot = divmod(int(wheres[run]), len(entries.slots))
        index = sealed(pieces[run][np.argsort(units[run], kind="stable")]) if mixed[run] else pieces[run]
        root, dim = entries.slots[slot]
        found[g].append((dim, Member(root[0], root[1], index.reshape(count[g], -1), roles[root])))
    return found


def _kinds(analysis: Analysis) -> dict[int, set[GroupKind]]:
    """What rules call the positions of a Dim."""
    kinds: dict[int, set[GroupKind]] = {}
    for effects in analysis.effects.values():
        for dim, kind in effects.kinds:
            kinds.setdefault(dim, set()).add(kind)
    return kinds


def _kind(found: set[GroupKind], uses: ChannelUses, members: Sequence[Member], units: Ints) -> GroupKind:
    if GroupKind.HEAD not in found and {GroupKind.QK_FEATURE, GroupKind.V_FEATURE} <= found:
        return GroupKind.HEAD_FEATURE
    first = GroupKind.most_specific(found)
    return uses.kind(members, units) if first.is_channel else first


def _group(number: int, members: tuple[Member, ...], kind: GroupKind) -> Group:
    first = next((m for m in members if m.role == "out"), members[0])
    ordered = sorted((m.role, m.axis, m.positions.shape[1]) for m in members)
    structure = hashlib.sha1(repr((kind, ordered)).encode()).hexdigest()[:12]
    return Group(number, f"{first.parameter}[{first.axis}]", kind, len(first.positions), members, structure)
