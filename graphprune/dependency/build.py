"""From components of tied positions to groups of interchangeable units."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import fx

from ..tracing.operators import Kind, Product, kind_of, products_of, shape_of
from .analysis import Analysis
from .dims import Root
from .groups import Group, Ints, Member, Role
from .whole.streams import ChannelUses

# The most specific name wins where Dims of several kinds are tied.
_KIND_ORDER = ("head", "head feature", "qk feature", "v feature", "conv group", "group channel", "channel")


@dataclasses.dataclass(frozen=True, eq=False)
class _Entries:
    """Indices of parameter axes that can go: along axis `slots[slot].root`, `index` has a coordinate on the slot's Dim
    that belongs to component `label`. In graph order."""

    slots: list[tuple[Root, int]]
    slot: Ints
    index: Ints
    label: Ints


def axis_roles(analysis: Analysis) -> dict[Root, Role]:
    """What each parameter axis does: produce channels, consume them, or scale them."""
    roles: dict[Root, Role] = {}
    for parameter, node in analysis.trace.parameters.items():
        shape = node.meta["val"].shape
        lone = sum(n > 1 for n in shape) == 1
        roles.update(((parameter, a), "vector" if lone else "other") for a in range(len(shape)))
    computed: list[Product] = []
    for node in analysis.trace.graph.nodes:
        for product in products_of(node):
            name = product.weight.meta.get("parameter") if product.weight.op == "get_attr" else None
            if name is not None:
                roles.update(((name, axis), role) for axis, role in _sides(product))
            elif product.fixed:
                computed.append(product)
    for product in computed:
        _roles_behind(roles, analysis, product)
    return roles


def _sides(product: Product) -> Iterator[tuple[int, Role]]:
    for axis in product.reads:
        yield axis, "in"
    for axis in product.produces:
        yield axis, "out"


def _roles_behind(roles: dict[Root, Role], analysis: Analysis, product: Product) -> None:
    """Weights that were sliced, transposed, scaled or standardised before the call that multiplies with them."""
    size = math.prod(shape_of(product.weight))
    for axis, role in _sides(product):
        for root in _axes_behind(analysis, product.weight, axis):
            parameter = analysis.trace.parameters.get(root[0])
            whole = parameter is not None and math.prod(shape_of(parameter)) == size > 1
            if roles.get(root) == "other" or (roles.get(root) == "vector" and whole):
                roles[root] = role


def _axes_behind(analysis: Analysis, weight: fx.Node, axis: int) -> set[Root]:
    """The axes of parameters whose indices lie along an axis of a tensor that is computed from them."""
    dims = set(analysis.state(weight).axis(axis))
    todo, seen = [weight], {weight}
    while todo:
        node = todo.pop()
        state = analysis.state(node)
        if kind_of(node) in _ALIGNED:  # the coordinates of one operand stand for those of all
            for a, axis_map in state.axes.items():
                if not dims.isdisjoint(axis_map):
                    for operand in map(analysis.state, node.all_input_nodes):
                        at = a - len(state.shape) + len(operand.shape)
                        if at >= 0 and operand.shape[at] == state.shape[a]:
                            dims.update(operand.axis(at))
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return {analysis.dims.root_of[dim] for dim in dims}


_ALIGNED = (Kind.POINTWISE, Kind.WEIGHT_NORM)


def build_groups(analysis: Analysis, roles: dict[Root, Role]) -> tuple[tuple[Group, ...], list[Ints]]:
    """All groups of removable units, in the order in which the network first uses their parameters, and the component
    number of each of their units."""
    entries = _entries(analysis)
    if entries is None:
        return (), []
    label = entries.label
    components = analysis.components
    # a hash per component of which axes it touches how often: equal hashes mean interchangeable units
    keys = np.random.default_rng(0).integers(1, 2**63, len(entries.slots), dtype=np.uint64)
    signature = np.zeros(components, np.uint64)
    np.add.at(signature, label, keys[entries.slot])
    signature += _treatment(analysis, components)
    # when each component is first seen, walking the axes in graph order: of repeated indices the last one written wins
    order = np.full(components, np.iinfo(np.int64).max)
    order[label[::-1]] = np.arange(len(label))[::-1]
    used = np.nonzero(order < len(label))[0]
    _, cluster = np.unique(signature[used], return_inverse=True)
    earliest = np.full(int(cluster.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(earliest, cluster, order[used])
    rank = np.empty(len(earliest), np.int64)
    rank[np.argsort(earliest, kind="stable")] = np.arange(len(rank))
    group_of = np.full(components, -1, np.int64)
    group_of[used] = rank[cluster]
    by_group = used[np.lexsort((order[used], group_of[used]))]
    starts = np.searchsorted(group_of[by_group], np.arange(len(rank)))
    unit_of = np.full(components, -1, np.int64)
    unit_of[by_group] = np.arange(len(by_group)) - starts[group_of[by_group]]
    units = np.split(by_group, starts[1:])
    return _assemble(analysis, roles, entries, group_of[label], unit_of[label], units), units


def _entries(analysis: Analysis) -> _Entries | None:
    """Every index of every parameter axis that can go, as flat arrays; None where nothing can."""
    dims, label = analysis.dims, analysis.label
    slots = [(root, dim) for root, axis_map in dims.roots.items() for dim in axis_map]
    if not slots:
        return None
    vectors = [dims.roots[root][dim] for root, dim in slots]
    lengths = np.array([len(v) for v in vectors])
    coordinate = np.concatenate(vectors)
    slot = np.repeat(np.arange(len(slots)), lengths)
    index = np.arange(len(coordinate)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    offset = np.array([dims.offset[dim] for _, dim in slots])
    labels = label[np.where(coordinate >= 0, offset[slot] + coordinate, 0)]
    free = labels != label[0]
    return _Entries(slots, slot[free], index[free], labels[free]) if free.any() else None


def _treatment(analysis: Analysis, components: int) -> npt.NDArray[np.uint64]:
    """A hash per component of the parts of axes it lies in, where code treats parts of an axis differently."""
    out = np.zeros(components, np.uint64)
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


def _assemble(
    analysis: Analysis, roles: dict[Root, Role], entries: _Entries, group: Ints, unit: Ints, units: list[Ints]
) -> tuple[Group, ...]:
    """One member per group and slot; `group` and `unit` say where each entry belongs."""
    sizes = [len(u) for u in units]
    kinds: dict[int, set[str]] = defaultdict(set)
    for effects in analysis.effects.values():
        for dim, kind in effects.kinds:
            kinds[dim].add(kind)
    place = group * len(entries.slots) + entries.slot
    sorting = np.argsort(place * (max(sizes) + 1) + unit, kind="stable")
    places, firsts = np.unique(place[sorting], return_index=True)
    members: dict[int, list[Member]] = defaultdict(list)
    kind_of: dict[int, set[str]] = defaultdict(set)
    for where, index in zip(places.tolist(), np.split(entries.index[sorting], firsts[1:]), strict=True):
        g, slot = divmod(where, len(entries.slots))
        root, dim = entries.slots[slot]
        members[g].append(Member(root[0], root[1], index.reshape(sizes[g], -1), roles[root]))
        kind_of[g] |= kinds.get(dim) or {"channel"}
    shapes = {name: node.meta["val"].shape for name, node in analysis.trace.parameters.items()}
    uses = ChannelUses(analysis)
    named = [_kind(kind_of[g], uses, members[g], units[g]) for g in range(len(sizes))]
    return tuple(_group(g, tuple(members[g]), named[g], shapes) for g in range(len(sizes)))


def _kind(found: set[str], uses: ChannelUses, members: list[Member], units: Ints) -> str:
    if "head" not in found and {"qk feature", "v feature"} <= found:
        return "head feature"
    first = min(found, key=_KIND_ORDER.index)
    return uses.kind(members, units) if first == "channel" else first


def _group(number: int, members: tuple[Member, ...], kind: str, shapes: dict[str, tuple[int, ...]]) -> Group:
    first = next((m for m in members if m.role == "out"), members[0])
    ordered = sorted((m.role, m.axis, m.positions.shape[1], shapes[m.parameter]) for m in members)
    structure = hashlib.sha1(repr((kind, [s[:3] for s in ordered])).encode()).hexdigest()[:12]
    return Group(number, f"{first.parameter}[{first.axis}]", kind, len(members[0].positions), members, structure)
