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
    large = len(axes) == 2 and tensor.numel() >= _LARGE and tensor.shape[2:].numel() >= _PIECE
    if large and axes.keys() == {0, 1} and tensor.is_contiguous():
        return _cut_pieces(tensor.detach(), *(keep(tensor.shape[a], axes[a]).to(tensor.device) for a in (0, 1)))
    order = sorted(axes, key=lambda a: len(axes[a]) / tensor.shape[a], reverse=True)
    out = tensor.detach()
    for axis in order:
        out = out.index_select(axis, keep(tensor.shape[axis], axes[axis]).to(tensor.device))
    return out


def _cut_pieces(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """These rows and columns of a matrix of pieces, such as kernels, without a copy in between."""
    places = (rows[:, None] * tensor.shape[1] + columns).reshape(-1)
    picked = tensor.flatten(0, 1).index_select(0, places)
    return picked.reshape(len(rows), len(columns), *tensor.shape[2:])
