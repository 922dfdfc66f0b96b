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


def cut_tensor(tensor: Tensor, axes: Mapping[int, Sequence[int]]) -> Tensor:
    """`tensor` without the given indices of its axes; shortest result first, so that little is copied twice."""
    order = sorted(axes, key=lambda a: len(axes[a]) / tensor.shape[a], reverse=True)
    out = tensor.detach()
    for axis in order:
        kept = torch.from_numpy(keep_indices(tensor.shape[axis], axes[axis])).to(tensor.device)
        out = out.index_select(axis, kept)
    return out
