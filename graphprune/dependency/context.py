"""What a rule works with: the operands of one node and the ways to relate their coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import fx

from ..errors import GraphPruneError
from ..tracing.names import operator_name
from ..tracing.origin import Expr, evaluate, leaves
from ..tracing.recorder import TensorMeta
from ..tracing.sizes import CallSizes
from .dims import DimTable
from .effects import NOTHING_REWRITTEN, Effects, EqualCounts, Reason, Rewritten, SizeSite, Union, literal_text
from .groups import GroupKind
from .state import (
    AxisMap,
    Mixed,
    Partial,
    Refine,
    State,
    Vector,
    axis_groups,
    multiplicity,
    separate,
    spread,
)

Result = State | list["State | None"] | None


class NodeContext:
    """One node being analysed. Rules read operands through it and report ties, freezes and sizes to it."""

    def __init__(
        self, node: fx.Node, env: dict[fx.Node, Result], dims: DimTable, rewritten: Rewritten = NOTHING_REWRITTEN
    ) -> None:
        self.node = node
        self.env = env
        self.dims = dims
        self.rewritten = rewritten
        self.effects = Effects()
        self._args = node.args

    # -- operands

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """A raw argument by position or name."""
        args = self._args
        if position < len(args):
            return args[position]
        return self.node.kwargs.get(name, default)

    def state(self, value: Any) -> State:
        """The coordinates of an operand; an empty state for numbers and for tensors without any."""
        if isinstance(value, fx.Node):
            found = self.env.get(value)
            if isinstance(found, State):
                return found
            meta = value.meta.get("val")
            if isinstance(meta, TensorMeta):
                return State(meta.shape)
        return State(())

    def states(self) -> list[State]:
        """Every tensor operand, in order."""
        return [self.state(n) for n in self.node.all_input_nodes]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        meta = self.node.meta["val"]
        if isinstance(meta, TensorMeta):
            return meta.shape
        return next((m.shape for m in meta or () if isinstance(m, TensorMeta)), ())

    @property
    def shapes(self) -> list[tuple[int, ...] | None]:
        """The shapes of all results."""
        metas = self.node.meta["val"] if isinstance(self.node.meta["val"], tuple) else (self.node.meta["val"],)
        return [m.shape if isinstance(m, TensorMeta) else None for m in metas]

    @property
    def sizes(self) -> CallSizes | None:
        return self.node.meta.get("sizes")

    def fresh(self, axis: int) -> AxisMap:
        """New coordinates for an axis of the result, a tensor made by the call, whose indices are all alike."""
        return self.dims.add_fresh(f"<{self.node.name}>", axis, self.shape[axis]) if self.shape[axis] > 1 else {}

    # -- statements

    def reason(self, kind: str, text: str) -> Reason:
        return Reason(kind, text, self.node)

    def freeze(self, axis_map: AxisMap, kind: str, text: str, where: Any = None) -> None:
        """The positions on an axis (those selected by the boolean or slice `where`) cannot be removed."""
        for d, v in axis_map.items():
            positions = self.dims.positions(d, v if where is None else v[where])
            if len(positions):
                self.effects.freezes.append((np.unique(positions), self.reason(kind, text)))

    def freeze_state(self, state: State, kind: str, text: str) -> None:
        for axis_map in state.axes.values():
            self.freeze(axis_map, kind, text)

    def freeze_dim(self, dim: int, kind: str, text: str) -> None:
        self.effects.freezes.append((self.dims.positions(dim), self.reason(kind, text)))

    def mark(self, axis_map: AxisMap, kind: GroupKind) -> None:
        """Name what the positions on an axis are."""
        named = GroupKind(kind)
        self.effects.kinds.extend((d, named) for d in axis_map)

    def statistics(self, axis_map: AxisMap) -> None:
        """A statistic over this axis (a mean, a norm, a softmax) changes when positions go."""
        self.effects.statistics.extend(self.dims.positions(d, v) for d, v in axis_map.items())

    def reads(self, axis_map: AxisMap) -> None:
        """The call sums over this axis of a weight: over the channels of what it multiplies with it."""
        _check_axis("reads", axis_map)

    def produces(self, axis_map: AxisMap) -> None:
        """What the call makes of this axis of a weight are the channels of its result."""
        _check_axis("produces", axis_map)

    def refine(self, request: Refine) -> None:
        if not any(r.dim == request.dim for r in self.effects.refines):
            self.effects.refines.append(request)

    def _union_whole(self, a: int, va: Vector, b: int, vb: Vector) -> None:
        """`union` of vectors without gaps."""
        if a == b and (va is vb or (len(va) == len(vb) and np.logical_and.reduce(va == vb))):
            return
        if len(va) > self.dims.size[a] and len(vb) > self.dims.size[b]:  # positions of a factor, each many times
            va, vb = self.dims.pairs(va, vb, self.dims.size[a])
        self.effects.unions.append(Union(a, va, b, vb))

    def union(self, a: int, va: Vector, b: int, vb: Vector) -> None:
        both = (va >= 0) & (vb >= 0)
        self._union_whole(a, va[both], b, vb[both])

    def blocked_by(self, value: Any, otherwise: str) -> str:
        """Why an operand has no coordinates, as the text of a tie."""
        if not isinstance(value, fx.Node):
            return otherwise
        seen, queue, found = {value}, [value], set()
        while queue and len(seen) < 512:
            node = queue.pop()
            if node.op == "get_attr" and "constant" not in node.meta:
                if node.meta["val"].dtype.is_floating_point and "parameter" in node.meta:
                    return otherwise
            elif not node.all_input_nodes:
                found.add(node.op)
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            queue += new
        if queue or not found & {"placeholder", "get_attr"}:
            return otherwise
        return "reads the model's input" if "placeholder" in found else "combined with a constant tensor"

    # -- ties

    def tie(self, a: AxisMap, b: AxisMap, length: int, what: str | Callable[[], str] = "") -> None:
        """The two axes lose the same indices, or none. `what`: why indices without a partner are immovable, or what
        finds that out, which is asked only where there are some."""
        if length == 1 or a is b or not (a or b):
            return
        if a and b and self.dims.are_whole(a, b) and self._tie_whole(a, b):
            return
        there_a, there_b = ({d: v >= 0 for d, v in axis_map.items()} for axis_map in (a, b))
        count_a, count_b = (sum(there.values(), np.zeros(length, np.int64)) for there in (there_a, there_b))
        alone_a, alone_b = (count_b == 0) & (count_a > 0), (count_a == 0) & (count_b > 0)
        if np.logical_or.reduce(alone_a | alone_b):
            text = (what if isinstance(what, str) else what()) or "meets indices that cannot be removed"
            self.freeze(a, "immovable", text, alone_a)
            self.freeze(b, "immovable", text, alone_b)
        one = (count_a == 1) & (count_b == 1)
        if one.any():
            for da, va in a.items():
                mine = one & there_a[da]
                for db, vb in b.items():
                    both = np.flatnonzero(mine & there_b[db])
                    if len(both):
                        self._union_whole(da, va[both], db, vb[both])
        for flat, product, mask in (
            (b, a, (count_a >= 2) & (count_b == 1)),
            (a, b, (count_b >= 2) & (count_a == 1)),
        ):
            if mask.any():
                self._factor_like(flat, product, mask)
        many = (count_a >= 2) & (count_b >= 2)
        if many.any():
            self._tie_products(a, b, many)

    def tie_vectors(self, axis_map: AxisMap, vectors: Iterable[fx.Node], length: int, what: str) -> None:
        """`tie` the axis with the one axis of each of these operands."""
        for vector in vectors:
            self.tie(axis_map, self.state(vector).axes.get(0, {}), length, what)

    def _tie_whole(self, a: AxisMap, b: AxisMap) -> bool:
        """The usual cases, without gaps: two Dims; two products of the same factors in the same order; one Dim that
        takes the factors of a product. False, and nothing said, in others."""
        if len(a) == len(b) == 1:
            ((da, va),), ((db, vb),) = a.items(), b.items()
            self._union_whole(da, va, db, vb)
            return True
        if len(a) == len(b):
            pairs = list(zip(a.items(), b.items(), strict=True))
            if not all(_same_partition(va, vb) for (_, va), (_, vb) in pairs):
                return False
            for (da, va), (db, vb) in pairs:
                self._union_whole(da, va, db, vb)
            return True
        if min(len(a), len(b)) > 1:
            return False
        flat, product = (a, b) if len(a) == 1 else (b, a)
        ((dim, vector),) = flat.items()
        columns = []
        for factor in product.values():
            column = factor
            if vector is not self.dims.counting(self.dims.size[dim]):
                column = np.full(self.dims.size[dim], -1, np.int64)
                column[vector] = factor
                if not np.logical_and.reduce(column[vector] == factor):
                    return False
            if np.logical_and.reduce(factor == factor[0]):
                return False
            columns.append(column)
        self.refine(Refine(dim, tuple(columns)))
        return True

    def _factor_like(self, flat: AxisMap, product: AxisMap, mask: Any) -> None:
        """Give a flat axis the factors of a product axis it is tied to."""
        varying = {}
        for p, f in product.items():
            values = f[mask][f[mask] >= 0]
            if len(values) and (values == values[0]).all():
                self.freeze({p: values[:1]}, "selected", "one index of a factor is used by itself")
            elif len(values):
                varying[p] = f
        factors = list(varying.values())
        for d, v in flat.items():
            here = mask & (v >= 0)
            if not here.any():
                continue
            if not factors:
                self.freeze({d: v[here]}, "immovable", "tied to an index that cannot be removed")
                continue
            if len(factors) == 1:
                ((p, f),) = varying.items()
                self.freeze({d: v[here & (f < 0)]}, "immovable", "tied to an index that cannot be removed")
                self.union(d, np.where(here, v, -1), p, np.where(here, f, -1))
                continue
            columns = []
            for f in factors:
                column = np.full(self.dims.size[d], -1, np.int64)
                column[v[here]] = f[here]
                if not (column[v[here]] == f[here]).all():
                    break
                columns.append(column)
            if len(columns) == len(factors):
                self.refine(Refine(d, tuple(columns)))
            else:
                self.freeze_dim(d, "contradiction", "tied to a product of axes it cannot be split into")
                for p in product:
                    self.freeze_dim(p, "contradiction", "tied to an axis that is no product of the same factors")

    def _tie_products(self, a: AxisMap, b: AxisMap, mask: Any) -> None:
        """Two products: match factor by factor; a factor that holds several of the other side's is split."""
        matched_a = {d: np.zeros(len(mask), bool) for d in a}
        matched_b = {d: np.zeros(len(mask), bool) for d in b}
        for da, va in a.items():
            for db, vb in b.items():
                here = mask & (va >= 0) & (vb >= 0)
                if here.any() and _same_partition(va[here], vb[here]):
                    self.union(da, np.where(here, va, -1), db, np.where(here, vb, -1))
                    matched_a[da] |= here
                    matched_b[db] |= here
        for mine, matched, theirs in ((a, matched_a, b), (b, matched_b, a)):
            for d, v in mine.items():
                rest = mask & (v >= 0) & ~matched[d]
                if rest.any():
                    self._split_by(d, v, theirs, rest)

    def _split_by(self, dim: int, vector: Vector, theirs: AxisMap, mask: Any) -> None:
        here = mask & (vector >= 0)
        if not here.any():
            return
        if (vector[here] == vector[here][0]).all():
            self.freeze_dim(dim, "contradiction", "only part of a product axis is tied")
            return
        columns = []
        for other in theirs.values():
            column = np.full(self.dims.size[dim], -1, np.int64)
            column[vector[here]] = other[here]
            values = column[vector[here]]
            if (values >= 0).all() and (values == other[here]).all() and (values != values[0]).any():
                columns.append(column)
        held = np.unique(vector[here])
        if columns:
            key = np.unique(np.stack([c[held] for c in columns]), axis=1, return_inverse=True)[1].reshape(-1)
            if len(np.unique(key)) < len(held):
                order = np.argsort(key, kind="stable")
                start = np.searchsorted(key[order], key[order])
                rest = np.full(self.dims.size[dim], -1, np.int64)
                rest[held[order]] = np.arange(len(held)) - start
                columns.append(rest)
        if len(columns) >= 2:
            self.refine(Refine(dim, tuple(columns)))
        else:
            self.freeze_dim(dim, "contradiction", "two factorings of one axis do not match")

    # -- results

    def separated(self, shape: Sequence[int], arrays: Iterable[tuple[int, Any]]) -> State:
        """A state from coordinate arrays (Dim, array that broadcasts to `shape`)."""
        axes: dict[int, AxisMap] = {}
        partial: dict[int, list[Partial]] = {}
        for dim, array in arrays:
            found = separate(dim, self.dims.size[dim], array)
            if found is None:
                flat = array.reshape(-1)[:1]
                if len(flat) and flat[0] >= 0:
                    self.freeze({dim: flat}, "selected", "one index of the axis is used by itself")
            elif isinstance(found, Refine):
                self.refine(found)
            elif isinstance(found, Partial):
                partial.setdefault(found.axis, []).append(found)
            elif isinstance(found, Mixed):
                self.freeze_dim(dim, "mixed", f"{self.operation} mixes its positions across axes")
            else:
                axis, vector = found
                axes.setdefault(axis, {})[dim] = vector
        for axis, parts in partial.items():
            axes[axis] = self._tie_slices(tuple(shape), axis, axes.get(axis, {}), parts)
        return State(shape, axes)

    def _tie_slices(self, shape: tuple[int, ...], axis: int, whole: AxisMap, parts: list[Partial]) -> AxisMap:
        """Different Dims lie along one axis in different slices: an index can go only from all slices at once."""
        joint = np.broadcast_shapes(*(p.array.shape for p in parts))
        rows = np.stack(
            [np.moveaxis(np.broadcast_to(p.array, joint), axis, -1).reshape(-1, shape[axis]) for p in parts]
        )
        slices = np.unique(rows.transpose(1, 0, 2).reshape(rows.shape[1], -1), axis=0)
        maps = []
        for row in slices.reshape(len(slices), len(parts), shape[axis]):
            present = {p.dim: v for p, v in zip(parts, row, strict=True) if (v >= 0).any()}
            maps.append({**whole, **present})
        best = max(maps, key=len)
        for other in maps:
            if other is not best:
                self.tie(best, other, shape[axis], "lies beside indices that cannot be removed")
        return best

    def reshape(self, state: State, shape: Sequence[int]) -> State:
        """The same elements in another shape."""
        shape = tuple(shape)
        axes: dict[int, AxisMap] = {}
        for left, right in axis_groups(state.shape, shape):
            maps = [(p, state.axes[a]) for p, a in enumerate(left) if a in state.axes]
            if not maps:
                continue
            before, after = tuple(state.shape[a] for a in left), tuple(shape[a] for a in right)
            long_left = [p for p, n in enumerate(before) if n > 1]
            long_right = [p for p, n in enumerate(after) if n > 1]
            if len(long_left) == 1 and len(long_right) == 1:
                axes[right[long_right[0]]] = maps[0][1]
                continue
            if len(long_left) == 1 and self._unravel(maps[0][1], [after[p] for p in long_right]):
                continue
            arrays = [(d, spread(v, p, before).reshape(after)) for p, m in maps for d, v in m.items()]
            part = self.separated(after, arrays)
            for position, axis_map in part.axes.items():
                axes[right[position]] = axis_map
        return State(shape, axes)

    def _unravel(self, axis_map: AxisMap, lengths: list[int]) -> bool:
        """A Dim that lies alone and in order on an axis which is now several: its factors are the new axes."""
        if len(axis_map) != 1:
            return False
        ((dim, vector),) = axis_map.items()
        if vector is not self.dims.counting(self.dims.size[dim]) and (
            len(vector) != self.dims.size[dim] or not np.logical_and.reduce(vector == np.arange(len(vector)))
        ):
            return False
        self.refine(Refine(dim, tuple(np.unravel_index(vector, lengths))))
        return True

    @property
    def operation(self) -> str:
        """The operator's name, for rules and people."""
        return operator_name(self.node) or str(self.node.target)

    # -- sizes

    def require(
        self, expr: Expr, axis_map: AxisMap, length: int, what: str, span: tuple[int, int] | None = None
    ) -> None:
        """A number in the user's code that must equal the surviving indices of `span`. Literals freeze at once."""
        if self.node in self.rewritten.nodes or any(True for _ in leaves(expr)):
            self.effects.sites.append(SizeSite(self.node, what, expr, axis_map, length, span))
        elif axis_map:
            text = literal_text(what, evaluate(expr, _no_leaf), self.node.meta.get("source"))
            why = self.rewritten.refusal(self.node)
            text += f", and no graph can stand for its module, whose forward {why}" if why else ""
            self.freeze(axis_map, "literal", text, slice(*span) if span else None)

    def require_equal(self, axis_map: AxisMap, length: int, blocks: int, what: str, apart: bool = True) -> None:
        """The axis is cut into `blocks` equal pieces that must stay equal; `apart`: they are treated differently."""
        if not axis_map or blocks <= 1:
            return
        if length % blocks:
            self.freeze(axis_map, "uneven", f"{what} into {blocks} unequal parts")
            return
        step = length // blocks
        pieces = [slice(i * step, (i + 1) * step) for i in range(blocks)]
        held = [[(d, np.unique(v[p])) for d, v in axis_map.items() if (v[p] >= 0).all()] for p in pieces]
        whole = all(
            len(factors) == sum(1 for v in axis_map.values() if (v[p] >= 0).any())
            and math.prod(len(values) for _, values in factors) == step
            for factors, p in zip(held, pieces, strict=True)
        )
        flat = multiplicity(axis_map, length)
        if (flat == 1).all():
            sets = [np.concatenate([self.dims.positions(d, v[p]) for d, v in axis_map.items()]) for p in pieces]
            self.effects.equal.append(EqualCounts(tuple(sets), what, self.node, apart))
        elif whole and all(len(h) == len(held[0]) for h in held):
            # each piece is a product: corresponding factors keep equal counts
            for factors in zip(*held, strict=True):
                sets = [self.dims.offset[d] + values for d, values in factors]
                distinct = {s.tobytes(): s for s in sets}
                if len({len(s) for s in sets}) > 1:
                    self.freeze(axis_map, "uneven", f"{what}: the parts are factored differently")
                elif len(distinct) > 1:
                    self.effects.equal.append(EqualCounts(tuple(distinct.values()), what, self.node, apart))
        else:
            self.freeze(axis_map, "uneven", f"{what}: some of its indices cannot be removed")


def _check_axis(what: str, axis_map: object) -> None:
    if not isinstance(axis_map, dict):
        raise GraphPruneError(
            f"call.{what}: expected what lies along one axis of a weight, such as call.state(call.arg(1)).axis(0), "
            f"got {type(axis_map).__name__}"
        )


def _same_partition(a: Vector, b: Vector) -> bool:
    if a is b or (len(a) == len(b) and np.logical_and.reduce(a == b)):
        return True
    forward = np.full(int(a.max()) + 1, -1, np.int64)
    backward = np.full(int(b.max()) + 1, -1, np.int64)
    forward[a], backward[b] = b, a
    return bool((forward[a] == b).all() and (backward[b] == a).all())


def _no_leaf(leaf: Any) -> int:
    raise AssertionError(leaf)
