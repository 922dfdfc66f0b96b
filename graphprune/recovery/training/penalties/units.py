"""The norms of all units of a network at once: every element of every parameter that goes with a unit, each once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ....dependency import Group
from ....dependency.groups import Ints

Shapes = Mapping[str, Sequence[int]]
_Axes = dict[str, dict[int, Ints]]  # tensor -> axis -> positions (units, k)


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """A vector of sums of squares of one tensor, from `start` on in the vector of all of them.

    Of one axis: for every index, over all other axes. Of several, which one unit reaches (a recurrent weight, a
    convolution inside a residual stream): for every unit of a group the elements that lie in all of them, where
    `positions` are its indices along each; with `sign`, so that an element is counted once in all.
    """

    axes: tuple[int, ...]
    start: int
    length: int
    positions: tuple[Ints, ...] = ()

    @property
    def sign(self) -> int:
        return 1 if len(self.axes) % 2 else -1


class Units:
    """The units of `groups` as slices of tensors of these `shapes`; members in other tensors are left out, and groups
    that have none in these.

    `groups`: those that are left, whose units follow one another. `names`: their tensors. `sizes`: how many elements a
    unit has, shape (groups,). `owner`: the place among `groups` of every unit.
    """

    def __init__(self, groups: Iterable[Group], shapes: Shapes) -> None:
        found = [(group, _axes_of(group, shapes)) for group in groups]
        found = [(group, axes) for group, axes in found if axes]
        self.groups = tuple(group for group, _ in found)
        self.names = tuple(dict.fromkeys(name for _, axes in found for name in axes))
        self.sizes = np.array([_size(axes, shapes) for _, axes in found], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(found)), [group.size for group in self.groups])
        self._blocks: dict[str, list[_Block]] = {}
        self.length = 0
        columns: dict[int, list[Ints]] = defaultdict(list)
        for name in self.names:
            parts = [(i, axes[name]) for i, (_, axes) in enumerate(found) if name in axes]
            self._lay(name, shapes[name], parts, columns)
        self._tables, self._order = _by_width([np.concatenate(columns[i], axis=1) for i in range(len(found))])
        self._places: dict[torch.device, tuple[list[Tensor], Tensor]] = {}

    def _lay(
        self, name: str, shape: Sequence[int], parts: list[tuple[int, dict[int, Ints]]], columns: dict[int, list[Ints]]
    ) -> None:
        """The blocks of one tensor, and for each unit of its groups the places in them that sum up to its square."""
        blocks: dict[int, _Block] = {}
        overlaps: list[_Block] = []
        for axis in sorted({axis for _, axes in parts for axis in axes}):
            blocks[axis] = _Block((axis,), self.length, shape[axis])
            self.length += shape[axis]
        for index, axes in parts:
            columns[index] += [blocks[axis].start + positions for axis, positions in axes.items()]
            for subset in _subsets(axes, 2):
                positions = tuple(axes[axis] for axis in subset)
                overlaps.append(_Block(subset, self.length, len(positions[0]), positions))
                columns[index].append(self.length + np.arange(len(positions[0]))[:, None])
                self.length += len(positions[0])
        self._blocks[name] = [*blocks.values(), *overlaps]

    def sums(self, name: str, tensor: Tensor) -> Tensor:
        """All that has to be known of one tensor, a vector in single precision (double for double)."""
        wide = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        squares = (wide if wide.dtype == torch.float64 else wide.float()).square()
        squares = squares.sum(-1) if tensor.is_complex() else squares
        return torch.cat([_summed(squares, block) for block in self._blocks[name]])

    def part(self, name: str) -> slice:
        """Where `sums(name, ...)` lies among those of all `names`, one after another."""
        blocks = self._blocks[name]
        return slice(blocks[0].start, blocks[-1].start + blocks[-1].length)

    def squares(self, sums: Tensor) -> Tensor:
        """The square of the norm of every unit, (units,), from the sums of all `names`, one after another."""
        if sums.device not in self._places:
            tables = [torch.from_numpy(table).to(sums.device) for table in self._tables]
            self._places[sums.device] = tables, torch.from_numpy(self._order).to(sums.device)
        tables, order = self._places[sums.device]
        return torch.cat([sums[table].sum(1) for table in tables])[order]


def _axes_of(group: Group, shapes: Shapes) -> _Axes:
    found: dict[str, dict[int, list[Ints]]] = {}
    for member in group.members:
        if member.parameter in shapes:
            found.setdefault(member.parameter, {}).setdefault(member.axis, []).append(member.positions)
    return {
        name: {axis: np.concatenate(parts, axis=1) for axis, parts in sorted(axes.items())}
        for name, axes in found.items()
    }


def _subsets(axes: Iterable[int], least: int = 1) -> list[tuple[int, ...]]:
    known = sorted(axes)
    return [s for n in range(least, len(known) + 1) for s in itertools.combinations(known, n)]


def _size(axes: _Axes, shapes: Shapes) -> int:
    """How many elements go with one unit; as many for each of a group."""
    total = 0
    for name, positions in axes.items():
        for subset in _subsets(positions):
            rest = math.prod(n for axis, n in enumerate(shapes[name]) if axis not in subset)
            total -= (-1) ** len(subset) * rest * math.prod(positions[axis].shape[1] for axis in subset)
    return total


def _summed(squares: Tensor, block: _Block) -> Tensor:
    others = [axis for axis in range(squares.dim()) if axis not in block.axes]
    summed = squares.sum(others) if others else squares
    if not block.positions:
        return summed
    places = []
    for i, positions in enumerate(block.positions):
        view = [block.length, *(positions.shape[1] if i == j else 1 for j in range(len(block.axes)))]
        places.append(torch.from_numpy(positions).to(squares.device).reshape(view))
    return block.sign * summed[tuple(places)].flatten(1).sum(1)


def _by_width(tables: Sequence[Ints]) -> tuple[list[Ints], Ints]:
    """Tables of one width joined, and for every unit, in the order of `tables`, its row among all rows of these."""
    widths: dict[int, list[int]] = defaultdict(list)
    for index, table in enumerate(tables):
        widths[table.shape[1]].append(index)
    ends = np.cumsum([0, *map(len, tables)])
    rows = [np.arange(ends[i], ends[i + 1]) for chosen in widths.values() for i in chosen]
    order = np.argsort(np.concatenate(rows), kind="stable") if rows else np.zeros(0, np.int64)
    return [np.ascontiguousarray(np.concatenate([tables[i] for i in chosen])) for chosen in widths.values()], order
