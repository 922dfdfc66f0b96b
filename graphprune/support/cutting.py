"""Tensors without some of the indices of their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


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
    order = sorted(axes, key=lambda a: len(axes[a]) / tensor.shape[a], reverse=True)
    out = tensor.detach()
    for axis in order:
        out = out.index_select(axis, keep(tensor.shape[axis], axes[axis]).to(tensor.device))
    return out
