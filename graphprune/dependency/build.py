"""From components of tied positions to groups of interchangeable units."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
from torch import fx

from ..tracing.names import operator_name
from .analysis import Analysis
from .dims import Root
from .groups import Group, Ints, Member, Role

# The most specific name wins where Dims of several kinds are tied.
_KIND_ORDER = ("head", "head feature", "conv group", "group channel", "channel")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Along axis `root`, the indices whose coordinate on `dim` is not -1, and the component of each."""

    root: Root
    dim: int
    index: Ints
    label: Ints


def axis_roles(analysis: Analysis) -> dict[Root, Role]:
    """What each parameter axis does: produce channels, consume them, or scale them."""
    roles: dict[Root, Role] = {}
    for name, node in analysis.trace.parameters.items():
        shape = node.meta["val"].shape
        long = [a for a, n in enumerate(shape) if n > 1]
        for a in range(len(shape)):
            roles[(name, a)] = "vector" if len(long) == 1 else "other"
        for user in node.users:
            _contraction_roles(roles, name, user, node)
    return roles


def _contraction_roles(roles: dict[Root, Role], name: str, user: fx.Node, node: fx.Node) -> None:
    operation = operator_name(user)
    args: tuple[Any, ...] = user.args
    ndim = len(node.meta["val"].shape)
    if ndim < 2:
        return
    if operation == "convolution" and len(args) > 1 and args[1] is node:
        transposed = bool(args[6])
        roles[(name, 0)], roles[(name, 1)] = ("in", "out") if transposed else ("out", "in")
    elif operation == "linear" and len(args) > 1 and args[1] is node:
        roles[(name, 0)], roles[(name, 1)] = "out", "in"
    elif operation in ("embedding", "_embedding_bag") and args[0] is node:
        roles[(name, 1)] = "out"
    elif operation in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        roles[(name, 1)] = "in"
    elif operation in ("mm", "bmm", "matmul", "addmm", "baddbmm"):
        first = 1 if operation in ("addmm", "baddbmm") else 0
        if args[first] is node:
            roles[(name, ndim - 1)], roles[(name, ndim - 2)] = "in", "out"
        elif args[first + 1] is node:
            roles[(name, ndim - 2)], roles[(name, ndim - 1)] = "in", "out"
    elif operation in (
        "t",
        "transpose",
        "permute",
        "view",
        "reshape",
        "_weight_norm_interface",
        "mul",
        "div",
        "detach",
    ):
        for after in user.users:
            inner = operator_name(after)
            if operation == "t" and inner in ("mm", "addmm", "matmul"):
                roles[(name, 0)], roles[(name, 1)] = "out", "in"
            elif inner in ("linear", "convolution", "getitem") or operation == "_weight_norm_interface":
                roles[(name, 0)], roles[(name, 1)] = "out", "in"


def build_groups(analysis: Analysis) -> tuple[tuple[Group, ...], list[Ints]]:
    """All groups of removable units, in the order in which the network first uses their parameters, and the component
    number of each of their units."""
    dims, label = analysis.dims, analysis.label
    slots = []
    for root, axis_map in dims.roots.items():
        for dim, vector in axis_map.items():
            index = np.nonzero(vector >= 0)[0]
            labels = label[dims.offset[dim] + vector[index]]
            free = labels != label[0]
            if free.any():
                slots.append(_Slot(root, dim, index[free].astype(np.int64), labels[free]))
    if not slots:
        return (), []
    signature = _signatures(slots, int(label.max()) + 1) + _treatment(analysis, int(label.max()) + 1)
    order = _order(slots, len(signature))
    used = np.unique(np.concatenate([s.label for s in slots]))
    _, cluster = np.unique(signature[used], return_inverse=True)
    rank = np.empty(int(cluster.max()) + 1, np.int64)
    earliest = np.full(len(rank), np.iinfo(np.int64).max)
    np.minimum.at(earliest, cluster, order[used])
    rank[np.argsort(earliest, kind="stable")] = np.arange(len(rank))
    group_of = np.full(len(signature), -1, np.int64)
    group_of[used] = rank[cluster]
    unit_of = np.full(len(signature), -1, np.int64)
    by_group = used[np.lexsort((order[used], group_of[used]))]
    starts = np.searchsorted(group_of[by_group], np.arange(len(rank)))
    unit_of[by_group] = np.arange(len(by_group)) - starts[group_of[by_group]]
    groups = _assemble(analysis, slots, group_of, unit_of, len(rank))
    return groups, np.split(by_group, starts[1:])


def _signatures(slots: list[_Slot], components: int) -> Ints:
    """A hash per component of which axes it touches how often: equal hashes mean interchangeable units."""
    signature = np.zeros(components, np.uint64)
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 2**63, len(slots), dtype=np.uint64)
    for slot, key in zip(slots, keys, strict=True):
        counts = np.bincount(slot.label, minlength=components) if len(slot.label) > components // 8 else None
        if counts is not None:
            signature += counts.astype(np.uint64) * key
        else:
            labels, n = np.unique(slot.label, return_counts=True)
            signature[labels] += n.astype(np.uint64) * key
    return signature.view(np.int64)


def _treatment(analysis: Analysis, components: int) -> Ints:
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
    return out.view(np.int64)


def _order(slots: list[_Slot], components: int) -> Ints:
    """When each component is first seen, walking the axes in graph order."""
    order = np.full(components, np.iinfo(np.int64).max)
    start = 0
    for slot in slots:
        np.minimum.at(order, slot.label, start + slot.index)
        start += int(slot.index.max()) + 1
    return order


def _assemble(analysis: Analysis, slots: list[_Slot], group_of: Ints, unit_of: Ints, count: int) -> tuple[Group, ...]:
    roles = axis_roles(analysis)
    kinds: dict[int, str] = {}
    for effects in analysis.effects.values():
        for dim, kind in effects.kinds:
            if dim not in kinds or _KIND_ORDER.index(kind) < _KIND_ORDER.index(kinds[dim]):
                kinds[dim] = kind
    members: dict[int, list[Member]] = defaultdict(list)
    kind_of: dict[int, set[str]] = defaultdict(set)
    for slot in slots:
        groups = group_of[slot.label]
        units = unit_of[slot.label]
        for g in np.unique(groups).tolist():
            here = groups == g
            order = np.argsort(units[here], kind="stable")
            size = int(units[here].max()) + 1
            positions = slot.index[here][order].reshape(size, -1)
            members[g].append(Member(slot.root[0], slot.root[1], positions, roles[slot.root]))
            kind_of[g].add(kinds.get(slot.dim, "channel"))
    out = []
    for g in range(count):
        parts = tuple(members[g])
        kind = min(kind_of[g], key=_KIND_ORDER.index)
        first = next((m for m in parts if m.role == "out"), parts[0])
        shapes: list[tuple[Role, int, int, tuple[int, ...]]] = sorted(
            (m.role, m.axis, m.positions.shape[1], analysis.trace.parameters[m.parameter].meta["val"].shape)
            for m in parts
        )
        structure = hashlib.sha1(repr((kind, [s[:3] for s in shapes])).encode()).hexdigest()[:12]
        out.append(Group(g, f"{first.parameter}[{first.axis}]", kind, len(parts[0].positions), parts, structure))
    return tuple(out)
