"""The linear algebra of recovery: ridge regression from moments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...importance.calibration import Moments

# Memory for the systems that are solved at a time, where each output has its own.
_BATCH_BYTES = 128 << 20


def ridge_solution(moments: Moments, start: Tensor, ridge: float, constant: bool) -> Tensor:
    """argmin_W sum |z W - y|^2 + lambda |W - start|^2, one problem per group, in float64.

    `start`: (groups, features + 1, outputs), the weights to fall back to where the data say nothing; the last row is
    the constant term, which is free of the penalty (`constant`) or held at zero correction. lambda is `ridge` times
    the mean second moment of a feature. Hoerl & Kennard, Technometrics 1970, centred on `start`.
    """
    few = moments.few
    if few is not None:
        return start + _change_by_rows(*few, start, ridge, constant)
    gram, penalty = moments.gram, _penalty(moments.gram, ridge)
    # solved for the change W - start: the right side is the gradient, small where `start` is good already
    right = moments.missed(start)
    if not constant:
        gram, right, penalty = gram[:, :-1, :-1], right[:, :-1], penalty[:, :-1]
    change = _solve(gram + torch.diag_embed(penalty), right)
    if not constant:
        change = torch.cat([change, change.new_zeros(change.shape[0], 1, change.shape[2])], 1)
    return start + change


def _change_by_rows(x: Tensor, y: Tensor, start: Tensor, ridge: float, constant: bool) -> Tensor:
    """The same change where rows are fewer than features: it is made of rows, so their products are all there is to
    solve (the dual form of ridge regression)."""
    left = y - x @ start[:, :-1] - start[:, -1:]
    power = _least(ridge * x.square().sum(1).mean(1))[:, None]
    middle, missed = x.mean(1, keepdim=True), left.mean(1, keepdim=True)
    if constant:
        x, left = x - middle, left - missed
    change = x.mT @ _solve(x @ x.mT + torch.diag_embed(power.expand(-1, x.shape[1])), left)
    last = missed - middle @ change if constant else torch.zeros_like(missed)
    return torch.cat([change, last], 1)


def masked_ridge_solution(moments: Moments, start: Tensor, ridge: float, free: Tensor) -> Tensor:
    """As `ridge_solution`, over the entries where `free` (boolean, like `start`) is true; the others stay.

    Every output is a system of its own, since each has another set of free weights; they are solved a batch at a time.
    """
    gram = moments.gram + torch.diag_embed(_penalty(moments.gram, ridge))
    right = moments.missed(start)
    out = start.clone()
    size = gram.shape[1]
    batch = max(1, _BATCH_BYTES // (8 * size * size * gram.shape[0]))
    for first in range(0, start.shape[2], batch):
        part = slice(first, first + batch)
        chosen = free[:, :, part].mT.flatten(0, 1)  # (groups x outputs, features + 1)
        groups, outputs = gram.shape[0], chosen.shape[0] // gram.shape[0]
        system = gram[:, None].expand(-1, outputs, -1, -1).flatten(0, 1) * (chosen[:, :, None] & chosen[:, None, :])
        system = system + torch.diag_embed((~chosen).to(system.dtype))  # what stays: change = 0
        change = _solve(system, (right[:, :, part].mT.flatten(0, 1) * chosen)[:, :, None])[:, :, 0]
        out[:, :, part] += change.reshape(groups, outputs, size).mT
    return out


def _penalty(gram: Tensor, ridge: float) -> Tensor:
    """What is added to the diagonal, (groups, features + 1): nothing for the constant term."""
    power = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1) if gram.shape[1] > 1 else gram[:, 0, 0]
    penalty = _least(ridge * power)[:, None].expand(-1, gram.shape[1]).clone()
    penalty[:, -1] = 0
    return penalty


def _least(penalty: Tensor) -> Tensor:
    return penalty.clamp_min(torch.finfo(torch.float64).tiny)


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
