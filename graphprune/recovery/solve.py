"""The linear algebra of recovery: ridge regression from moments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration import Moments


def ridge_solution(moments: Moments, start: Tensor, ridge: float, constant: bool) -> Tensor:
    """argmin_W sum |z W - y|^2 + lambda |W - start|^2, one problem per group, in float64.

    `start`: (groups, features + 1, outputs), the weights to fall back to where the data say nothing; the last row is
    the constant term, which is free of the penalty (`constant`) or held at zero correction. lambda is `ridge` times
    the mean second moment of a feature. Hoerl & Kennard, Technometrics 1970, centred on `start`.
    """
    gram = moments.gram
    power = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1) if gram.shape[1] > 1 else gram[:, 0, 0]
    penalty = (ridge * power).clamp_min(torch.finfo(torch.float64).tiny)[:, None].expand(-1, gram.shape[1]).clone()
    penalty[:, -1] = 0
    # solved for the change W - start: the right side is the gradient, small where `start` is good already
    right = moments.cross - gram @ start
    if not constant:
        gram, right, penalty = gram[:, :-1, :-1], right[:, :-1], penalty[:, :-1]
    change = _solve(gram + torch.diag_embed(penalty), right)
    if not constant:
        change = torch.cat([change, change.new_zeros(change.shape[0], 1, change.shape[2])], 1)
    return start + change


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Symmetric positive definite systems; what is singular in floating point gets a larger diagonal."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    jitter = torch.zeros_like(diagonal[:, :1])
    for _ in range(12):
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(jitter.expand_as(diagonal)))
        if not bool(info.any()):
            return torch.cholesky_solve(right, factor)
        floor = 1e-14 * diagonal.amax(1, keepdim=True).clamp_min(1e-300)
        jitter = torch.where(info[:, None] > 0, (jitter * 100).clamp_min(floor), jitter)
    return torch.zeros_like(right)


def squared_error(moments: Moments, weights: Tensor) -> float:
    """sum |z W - y|^2 over all rows, groups and outputs."""
    fit = (weights * (moments.gram @ weights - 2 * moments.cross)).sum()
    return max(0.0, float(fit + moments.energy.sum()))
