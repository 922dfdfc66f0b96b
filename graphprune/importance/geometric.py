"""Worth by how far a filter is from the others: "fpgm"."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dependency.groups import Group
from .context import Floats, ImportanceContext
from .magnitude import judged_members, over_members
from .registry import criterion

# Entries of the largest temporary (32 MiB of float64). What is held at a time is bounded in both directions: rows of
# the distance matrix and columns of the weights.
_ENTRIES = 1 << 22


@criterion("fpgm")
def fpgm(context: ImportanceContext, group: Group) -> Floats:
    """Sum of the distances from a filter to all others of its layer (He et al., Filter Pruning via Geometric Median,
    CVPR 2019): filters near the middle can be replaced by the others and go first.

    Euclidean distances, computed in float64. Mean over the layers that produce the channels (see `judged_members`).
    Grows with the filter and with the group: `normalise` before ranking across groups. Time is quadratic in the
    group's size, memory is bounded.
    """
    return over_members(group, [distance_sums(context.matrix(m)) for m in judged_members(context, group)])


def distance_sums(matrix: Tensor) -> Floats:
    """Sum over v of |row u - row v| for every row u of a matrix (units, features), shape (units,)."""
    if matrix.device.type == "mps":  # has no float64
        matrix = matrix.cpu()
    units, features = matrix.shape
    rows = columns = max(1, _ENTRIES // max(1, units))
    squares = torch.zeros(units, dtype=torch.float64, device=matrix.device)
    for column in range(0, features, columns):
        squares += matrix[:, column : column + columns].double().square().sum(1)
    sums = torch.zeros_like(squares)
    for row in range(0, units, rows):
        part = slice(row, min(row + rows, units))
        distances = squares[part, None] + squares[None, :]
        for column in range(0, features, columns):
            block = matrix[:, column : column + columns].double()
            distances.addmm_(block[part], block.T, alpha=-2.0)
        distances.clamp_(min=0.0).sqrt_()  # rounding may leave equal filters slightly below zero
        distances.diagonal(offset=row).zero_()
        sums[part] = distances.sum(1)
    result: Floats = sums.cpu().numpy()
    return result
