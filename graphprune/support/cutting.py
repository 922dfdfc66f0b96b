"""Tensors without some of the indices of their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Elements in one piece, and in all, from which on picking pieces is faster than picking rows and then columns.
_PIECE, _LARGE = 4, 1 << 19


def keep_indices(length: int, removed: Sequence[int]) -> np.ndarray:
    """The indices that stay."""
    mask = np.ones(length, bool)
    mask[np.asarray(removed, np.int64)] = False
    return np.nonzero(mask)[0]


class Kept:
    """Which indices stay, found out once for each list of removed ones, which must outlive this."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, length: int, removed: Sequence[int]) -> Tensor:
        key = length, id(removed)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = torch.from_numpy(keep_indices(length, removed))
        return found


def cut_tensor(tensor: Tensor, axes: Mapping[int, Sequence[int]], keep: Kept | None = None) -> Tensor:
    """`tensor` without the given indices of its axes; shortest result first, so that little is copied twice. `keep`:
    what is known already of the same indices."""
    keep = keep or Kept()
    if axes.keys() == {0, 1} and tensor.numel() >= _LARGE and tensor.is_contiguous():
        rows, columns = (keep(tensor.shape[a], axes[a]) for a in (0, 1))
        run = _run(columns.numpy(), tensor.shape[1])
        if run * tensor.shape[2:].numel() >= _PIECE:
            return _cut_pieces(tensor.detach(), rows, columns[::run] // run, run)
    order = sorted(axes, key=lambda a: len(axes[a]) / tensor.shape[a], reverse=True)
    out = tensor.detach()
    for axis in order:
        out = out.index_select(axis, keep(tensor.shape[axis], axes[axis]).to(tensor.device))
    return out


def _run(kept: np.ndarray, length: int) -> int:
    """The largest number that all runs of kept indices, and all that goes between them, are multiples of."""
    edges = np.flatnonzero(np.diff(kept, prepend=-2) != 1)
    return int(np.gcd.reduce([length, len(kept), *kept[edges], *edges]))


def _cut_pieces(tensor: Tensor, rows: Tensor, pieces: Tensor, run: int) -> Tensor:
    """These rows of a matrix, and of its columns, of which so many are one piece, these pieces, without a copy in
    between. What stands at one place of the matrix may have axes of its own."""
    by_row = tensor.shape[1] // run
    places = (rows[:, None] * by_row + pieces).reshape(-1).to(tensor.device)
    picked = tensor.reshape(tensor.shape[0] * by_row, -1).index_select(0, places)
    return picked.reshape(len(rows), len(pieces) * run, *tensor.shape[2:])
