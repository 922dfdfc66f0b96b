"""The table of Dims: sizes, where each lives, and how one is replaced by its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .state import AxisMap, Mask, Refine, Vector, sealed

Root = tuple[str, int]  # (parameter, axis)
# Columns whose patterns are told apart by counting; more are sorted.
_FEW = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Every index of every parameter axis, once for each Dim on the axis, as flat arrays in graph order.

    `slots[k]`: an axis, as its place in `roots`, and a Dim on it. Entry e belongs to slot `slot[e]`; it is index
    `index[e]` of the axis, and `position[e]` the global number of its coordinate, 0 ("immovable") where it has none.
    The axes one after the other make one line; root r begins at `starts[r]`, and entry e stands at `place[e]`.
    """

    roots: tuple[Root, ...]
    slots: tuple[tuple[int, int], ...]
    slot: Vector
    index: Vector
    position: Vector
    starts: Vector
    place: Vector

    def marked(self, entries: Mask) -> Mask:
        """Along the line of all axes: the indices of which an entry is marked."""
        found = np.zeros(int(self.starts[-1]), bool)
        found[self.place[entries]] = True
        return found

    def by_root(self, line: Mask) -> Iterator[tuple[Root, Vector]]:
        """Each axis with the marked indices on it, where it has some."""
        marked = np.flatnonzero(line)
        bounds = np.searchsorted(marked, self.starts).tolist()
        for k, root in enumerate(self.roots):
            if bounds[k] < bounds[k + 1]:
                yield root, marked[bounds[k] : bounds[k + 1]] - self.starts[k]


class DimTable:
    """Every Dim belongs to one axis of one parameter; its positions are numbered globally from `offset`."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self.offset: list[int] = []
        self.root_of: list[Root] = []
        self.roots: dict[Root, AxisMap] = {}
        self.fresh: dict[Root, AxisMap] = {}  # axes of tensors that the model's code makes, (name of the node, axis)
        self.total = 1  # position 0 stands for "immovable"
        self._counting: dict[int, Vector] = {}
        # facts about sealed vectors, which many nodes share, by their identities; the vectors are kept with them
        self._whole: dict[int, Vector] = {}  # those known to have a coordinate at every index
        self._pairs: dict[tuple[int, int], tuple[Vector, Vector, Vector, Vector]] = {}
        self._numbers: dict[int, tuple[Vector, int, Vector]] = {}
        self._layout: tuple[int, int, Layout] | None = None

    def counting(self, length: int) -> Vector:
        """0, 1, ..., one array for all axes of this length."""
        found = self._counting.get(length)
        if found is None:
            found = self._counting[length] = sealed(np.arange(length, dtype=np.int64))
            self._whole[id(found)] = found
        return found

    def are_whole(self, *axes: AxisMap) -> bool:
        """Every Dim on the axes has a coordinate at every index."""
        for axis_map in axes:
            for vector in axis_map.values():
                if id(vector) not in self._whole and not self.is_whole(vector):
                    return False
        return True

    def is_whole(self, vector: Vector) -> bool:
        """It has a coordinate at every index."""
        if id(vector) in self._whole:
            return True
        found = bool(np.minimum.reduce(vector) >= 0)
        if found and not vector.flags.writeable:
            self._whole[id(vector)] = vector
        return found

    def counts(self, vector: Vector) -> bool:
        """Whether this is the one array that counts so far."""
        return self._counting.get(len(vector)) is vector

    def lengths(self) -> Vector:
        """The size of each Dim, or what it was before it was factored."""
        return np.diff([*self.offset, self.total])

    def pairs(self, a: Vector, b: Vector, size: int) -> tuple[Vector, Vector]:
        """Two whole vectors with every pair once; as they are where the second does not follow from the first, whose
        Dim has `size` positions."""
        known = self._pairs.get((id(a), id(b)))
        if known is None:
            once = _once(a, b, size)
            known = (a, b, self._counted(a[once]), self._counted(b[once]))
            if not (a.flags.writeable or b.flags.writeable):
                self._pairs[id(a), id(b)] = known
        return known[2:]

    def _counted(self, vector: Vector) -> Vector:
        """The one array that counts, where this one does."""
        counting = self.counting(len(vector))
        return counting if np.logical_and.reduce(vector == counting) else vector

    def add_root(self, parameter: str, axis: int, length: int) -> AxisMap:
        """The axis starts as one Dim of its own."""
        root = (parameter, axis)
        if root not in self.roots:
            self.roots[root] = {self._new(root, length): self.counting(length)}
        return self.roots[root]

    def add_fresh(self, node: str, axis: int, length: int) -> AxisMap:
        """An axis that no parameter has: all its indices are alike, and it follows what it is tied to."""
        root = (node, axis)
        if root not in self.fresh:
            self.fresh[root] = {self._new(root, length): self.counting(length)}
        return self.fresh[root]

    def _new(self, root: Root, size: int) -> int:
        self.size.append(size)
        self.offset.append(self.total)
        self.root_of.append(root)
        self.total += size
        return len(self.size) - 1

    def positions(self, dim: int, index: Vector | None = None) -> Vector:
        """Global numbers of all positions of `dim`, or of those in a coordinate vector (absent ones left out)."""
        if index is None:
            return np.arange(self.offset[dim], self.offset[dim] + self.size[dim], dtype=np.int64)
        return self.offset[dim] + index[index >= 0]

    def positions_of(self, dims: Sequence[int]) -> Vector:
        """The positions of all of these Dims, rising."""
        here = np.zeros(len(self.size), bool)
        here[list(dims)] = True
        return np.flatnonzero(np.repeat(here, np.diff([*self.offset, self.total]))) + 1

    def layout(self) -> Layout:
        """All parameter axes as they are now."""
        if self._layout is None or self._layout[:2] != (len(self.size), len(self.roots)):
            self._layout = len(self.size), len(self.roots), self._laid_out()
        return self._layout[2]

    def _laid_out(self) -> Layout:
        slots = [(k, dim) for k, axis_map in enumerate(self.roots.values()) for dim in axis_map]
        vectors = [vector for axis_map in self.roots.values() for vector in axis_map.values()]
        lengths = np.fromiter(map(len, vectors), np.int64, len(vectors))
        ends = np.cumsum(lengths)
        slot = np.repeat(np.arange(len(slots)), lengths)
        index = np.arange(len(slot)) - (ends - lengths)[slot]
        axes = [len(next(iter(axis_map.values()))) for axis_map in self.roots.values()]
        starts = np.cumsum([0, *axes])
        coordinate = np.concatenate(vectors) if vectors else np.zeros(0, np.int64)
        position = coordinate + np.array(self.offset, np.int64)[[dim for _, dim in slots]][slot]
        if coordinate.min(initial=0) < 0:
            position[coordinate < 0] = 0
        place = index + starts[[k for k, _ in slots]][slot]
        made = map(sealed, (slot, index, position, starts, place))
        return Layout(tuple(self.roots), tuple(slots), *made)

    def refine(self, request: Refine) -> Root:
        """Replace a Dim by its factors in its root axis. Positions that lie in different columns get factors apart, and
        those outside all columns become a Dim of their own.

        Returns the root whose map changed. States elsewhere are recomputed by the next pass.
        """
        dim = request.dim
        root = self.root_of[dim]
        size = self.size[dim]
        tables: list[tuple[int, Vector]] = []
        if all(map(self.is_whole, request.columns)):  # the usual case
            tables = [(self._new(root, count), place) for count, place in self._factors(request.columns, size)]
        else:
            for present, inside in _patterns(np.stack(request.columns) >= 0):
                here = [column[inside] for column, found in zip(request.columns, present, strict=True) if found]
                for count, place in self._factors(here, int(inside.sum())):
                    table = np.full(size, -1, np.int64)
                    table[inside] = place
                    tables.append((self._new(root, count), table))
        table_of = self.roots if dim in self.roots.get(root, ()) else self.fresh
        axis_map = dict(table_of[root])
        old = axis_map.pop(dim)
        for new, table in tables:
            axis_map[new] = self._placed(table, old)
        table_of[root] = axis_map
        self.size[dim] = 0
        return root

    def _factors(self, columns: Sequence[Vector], positions: int) -> list[tuple[int, Vector]]:
        """For positions that lie in all of some columns: a number of values per column, and each entry's rank among
        them.

        Without columns every position is one by itself. Of several columns, those that tell nothing apart are left out.
        """
        if not columns:
            return [(positions, np.arange(positions))]
        found = [self._ranks(column) for column in columns]
        return found if len(found) == 1 else [(count, place) for count, place in found if count > 1]

    def _ranks(self, column: Vector) -> tuple[int, Vector]:
        """`_numbered`, once for a vector that can no longer change."""
        known = self._numbers.get(id(column))
        if known is None:
            known = (column, *_numbered(column))
            if not column.flags.writeable:
                self._numbers[id(column)] = known
        return known[1:]

    def _placed(self, table: Vector, old: Vector) -> Vector:
        """The coordinates that `table` gives to a Dim's positions, where the Dim has the coordinates `old`. Axes that
        are factored alike share the vector."""
        if old is self.counting(len(table)):
            return sealed(table)
        return sealed(table[old] if self.is_whole(old) else np.where(old >= 0, table[old], -1))


def _once(a: Vector, b: Vector, size: int) -> Vector | slice:
    at = np.full(size, -1, np.int64)
    at[a] = np.arange(len(a))
    once = at[at >= 0]
    return once if np.logical_and.reduce(b[at[a]] == b) else slice(None)


def _patterns(present: npt.NDArray[np.bool_]) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """The different columns of a mask, and where each is found."""
    if len(present) > _FEW:
        found, number = np.unique(present, axis=1, return_inverse=True)
        return [(found[:, k], number.reshape(-1) == k) for k in range(found.shape[1])]
    weights = 1 << np.arange(len(present))[::-1]
    number = weights @ present
    patterns = np.flatnonzero(np.bincount(number))
    return [((k & weights) > 0, number == k) for k in patterns.tolist()]


def _numbered(column: Vector) -> tuple[int, Vector]:
    """The number of different values, and the rank of each entry among them. Columns are usually ranks already."""
    present = np.bincount(column) > 0
    if present.all():
        return len(present), column
    return int(present.sum()), (np.cumsum(present) - 1)[column]
