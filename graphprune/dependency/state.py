"""Coordinates: what a recorded tensor carries through the analysis.

A **Dim** is a set of prunable positions. Along one axis of a tensor, the coordinate vector of a Dim says which of its
positions each index belongs to, -1 for none. Several Dims may share an axis (12 heads x 64 features laid flat): an
index disappears exactly when one of its coordinates is removed. An index without any coordinate is immovable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
AxisMap = dict[int, Vector]  # Dim -> coordinate of every index along one axis


def sealed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, which is shared from now on and can no longer be written to."""
    array.setflags(write=False)
    return array


class State:
    """The coordinates of one tensor: for each axis that has any, a map from Dim to coordinate vector."""

    __slots__ = ("axes", "shape")

    def __init__(self, shape: Iterable[int], axes: dict[int, AxisMap] | None = None) -> None:
        self.shape = tuple(shape)
        self.axes = {a: m for a, m in (axes or {}).items() if m}

    def axis(self, axis: int) -> AxisMap:
        return self.axes.get(axis % len(self.shape) if self.shape else axis, {})

    def dims(self) -> set[int]:
        return {d for m in self.axes.values() for d in m}

    def moved(self, shape: Iterable[int], mapping: dict[int, int]) -> State:
        """Axis `a` of this tensor becomes axis `mapping[a]`; axes not mentioned are dropped."""
        return State(shape, {mapping[a]: m for a, m in self.axes.items() if a in mapping})

    def with_axis(self, axis: int, length: int, new: AxisMap) -> State:
        shape = list(self.shape)
        shape[axis] = length
        return State(shape, {**{a: m for a, m in self.axes.items() if a != axis}, axis: new})


@dataclasses.dataclass(frozen=True)
class Refine:
    """Dim `dim` is to be replaced by one Dim per column; `columns[k][v]` is the place of position v, -1 for none."""

    dim: int
    columns: tuple[Vector, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Partial:
    """`dim` lies along `axis`, but not in every slice of the other axes; `array` has -1 where it does not."""

    dim: int
    axis: int
    array: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Positions of `dim` meet on one index in a way that no factoring separates."""

    dim: int


def axis_of(dim: int, ndim: int) -> int:
    """A dimension argument as an axis: negative ones count from the end."""
    return int(dim) % ndim if ndim else 0


def take(axis_map: AxisMap, index: npt.NDArray[np.int64] | slice) -> AxisMap:
    """The coordinates of some of the indices."""
    return {d: v[index] for d, v in axis_map.items()}


def concatenate(maps: list[tuple[AxisMap, int]]) -> AxisMap:
    """Axes laid one after the other; each is (map, length)."""
    total = sum(n for _, n in maps)
    out: AxisMap = {}
    start = 0
    for axis_map, n in maps:
        for d, v in axis_map.items():
            if d not in out:
                out[d] = np.full(total, -1, np.int64)
            out[d][start : start + n] = v
        start += n
    return out


def multiplicity(axis_map: AxisMap, length: int) -> Vector:
    """How many coordinates each index has."""
    count = np.zeros(length, np.int64)
    for v in axis_map.values():
        count += v >= 0
    return count


def axis_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into independent parts: runs of input axes and output axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        a, b = before[i] if left else 1, after[j] if right else 1
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b and i < len(before):
                a *= before[i]
                left.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                right.append(j)
                j += 1
            else:
                a *= before[i]
                left.append(i)
                i += 1
        groups.append((left, right))
    return groups


def _classes(array: npt.NDArray[np.int64], axis: int) -> Vector:
    """Indices along `axis` with identical slices get the same class number, in order of appearance."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    rng = np.random.default_rng(rows.shape[1])
    key = ((rows + 2).astype(np.uint64) * rng.integers(1, 2**63, rows.shape[1], dtype=np.uint64)).sum(1)
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse]


def separate(dim: int, size: int, array: npt.NDArray[np.int64]) -> tuple[int, Vector] | Refine | Partial | Mixed | None:
    """Find the one axis along which `array`, the coordinates of `dim` (with `size` positions), varies.

    Returns (axis, vector); or Refine when it varies along several axes that each follow from the position; or Partial
    when it lies along one axis in some slices only; or Mixed when no axis follows from it; or None when the array is
    constant (a single index).
    """
    varying = []
    for axis in range(array.ndim):
        if array.shape[axis] > 1:
            first = array.take([0], axis=axis)
            if (array == first).all():
                array = first
            else:
                varying.append(axis)
    if not varying:
        return None
    if len(varying) == 1:
        return varying[0], np.ascontiguousarray(array.reshape(-1))
    present = array >= 0
    values = array[present]
    where = np.nonzero(present)
    columns = []
    homes = []
    for axis in varying:
        index = _classes(array, axis)[where[axis]]
        column = np.full(size, -1, np.int64)
        column[values] = index
        if (column[values] == index).all() and (index != index[0]).any():
            columns.append(column)
            homes.append(axis)
    if not columns:
        return Mixed(dim)
    count = len(np.unique(values))
    for column, home in zip(columns, homes, strict=True):
        if len(np.unique(column[values])) == count:  # no factor: every position has an index of its own here
            return Partial(dim, home, array)
    return Refine(dim, tuple(columns))


def spread(axis_map_vector: Vector, position: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """A coordinate vector along axis `position`, broadcast to `shape`."""
    view = [1] * len(shape)
    view[position] = len(axis_map_vector)
    return np.broadcast_to(axis_map_vector.reshape(view), shape)
