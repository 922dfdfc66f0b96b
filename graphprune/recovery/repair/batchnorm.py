"""Batch norm statistics, estimated again on the pruned network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import GraphPruneError
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .walk import Inputs


def reestimate(model: nn.Module, data: Inputs) -> int:
    """Replace running means and variances by cumulative averages over the batches, in place; how many norms ran.

    Every batch counts alike, with the mean and unbiased variance of that batch, as `torch.optim.swa_utils.update_bn`
    does; everything but the batch norms is in eval mode. Norms that the data do not reach keep what they had.

    Raises GraphPruneError where no batch norm keeps statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and isinstance(m.running_mean, Tensor)]
    if not norms:
        raise GraphPruneError(
            "recover='batchnorm': the model has no batch norm with running statistics; use recover='least_squares' or "
            "'mean'"
        )
    saved = [(n, n.momentum, [b.detach().clone() for b in _statistics(n)]) for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with evaluating(model):
        for norm in norms:
            norm.training = True
        for example in data.inputs():
            run_model(model, example.clone(), "data")
    ran = 0
    for norm, momentum, before in saved:
        norm.momentum = momentum
        counted = int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 1
        ran += bool(counted)
        if counted and not all(bool(torch.isfinite(b).all()) for b in _statistics(norm)):
            raise GraphPruneError(
                "data: what reaches a batch norm is not finite (NaN or infinite) on some batch; leave it out, or look "
                "at how it is read"
            )
        if not counted:
            for buffer, old in zip(_statistics(norm), before, strict=True):
                buffer.copy_(old)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(before[-1])
    return ran


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    return [b for b in (norm.running_mean, norm.running_var, norm.num_batches_tracked) if b is not None]
