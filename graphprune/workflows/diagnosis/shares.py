"""How much of a block of numbers lies in the slices that someone holds: exact, without looking at each number."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ...dependency.analysis import Analysis
from ...dependency.groups import Ints
from ...dependency.state import AxisMap
from .work import Axes


class Shares:
    """Counts, for several holders at once, the elements of a block that lie in their slices.

    `labels[h]` are the components (numbers in `Analysis.tied`) of holder h. With `frozen`, only indices count that
    cannot be removed; else every index with a coordinate in the holder's components.
    """

    def __init__(self, analysis: Analysis, labels: list[Ints], frozen: bool) -> None:
        assert analysis.tied is not None
        self.analysis = analysis
        self.tied = analysis.tied
        self.frozen = frozen
        self.holders = len(labels)
        self._selector = _selectors(analysis)
        found = np.concatenate(labels) if labels else np.zeros(0, np.int64)
        holder = np.repeat(np.arange(len(labels)), [len(mine) for mine in labels])
        order = np.argsort(found, kind="stable")
        self._holder = holder[order]  # of component c: _holder[_start[c] : _start[c + 1]]
        self._start = np.searchsorted(found[order], np.arange(int(self.tied.max()) + 2))
        self._cache: dict[int, tuple[Ints, AxisMap]] = {}

    def on_axis(self, axis_map: AxisMap, length: int) -> Ints:
        """How many indices of an axis each holder holds."""
        known = self._cache.get(id(axis_map))
        if known is None:  # the map is kept, so that its id stays its own
            known = self._cache[id(axis_map)] = (self._count(axis_map, length), axis_map)
        return known[0]

    def _count(self, axis_map: AxisMap, length: int) -> Ints:
        free = free_indices(self.analysis, axis_map, length)
        labels = {d: self.tied[self.analysis.dims.offset[d] + np.maximum(v, 0)] for d, v in axis_map.items()}
        channel = np.zeros(length, bool)
        for dim, vector in axis_map.items():
            channel |= (vector >= 0) & ~self._selector[labels[dim]]
        pairs = [np.zeros(0, np.int64)]
        for dim, vector in axis_map.items():
            counts = (vector >= 0) & ~(self._selector[labels[dim]] & channel) & ~(free & self.frozen)
            here = np.nonzero(counts)[0]
            first, last = self._start[labels[dim][here]], self._start[labels[dim][here] + 1]
            number = last - first
            within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
            pairs.append(np.repeat(here, number) * self.holders + self._holder[np.repeat(first, number) + within])
        return np.bincount(np.unique(np.concatenate(pairs)) % max(self.holders, 1), minlength=self.holders)

    def elements(self, axes: Axes, total: int) -> list[int]:
        """Of `total` numbers spread evenly over `axes`, how many lie in slices of each holder: all but those outside
        its slices on every axis."""
        outside = [1] * self.holders
        for length, axis_map in axes:
            held = self.on_axis(axis_map, length).tolist()
            outside = [n * (length - mine) for n, mine in zip(outside, held, strict=True)]
        block = math.prod(length for length, _ in axes)
        return [total * (block - n) // block for n in outside]


def _selectors(analysis: Analysis) -> npt.NDArray[np.bool_]:
    """Components of positions that are picked one by one: q, k and v of a fused projection are no channels, its heads
    and features are."""
    return analysis.ties_of(positions for positions, reason in analysis.freezes if reason.kind == "selected")


def free_indices(analysis: Analysis, axis_map: AxisMap, length: int) -> npt.NDArray[np.bool_]:
    """The indices of an axis that go with some channel that can be removed."""
    free = np.zeros(length, bool)
    for dim, vector in axis_map.items():
        here = np.nonzero(vector >= 0)[0]
        free[here] |= ~analysis.frozen(analysis.dims.offset[dim] + vector[here])
    return free


def free_elements(analysis: Analysis, axes: Axes, total: int) -> int:
    """Of `total` numbers spread evenly over `axes`, how many go with some channel that can be removed."""
    outside, block = 1, 1
    for length, axis_map in axes:
        outside *= length - int(free_indices(analysis, axis_map, length).sum())
        block *= length
    return total * (block - outside) // block
