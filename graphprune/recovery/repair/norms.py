"""Batch norms that a plan keeps: layers are fitted as if these were folded, and taken apart again afterwards.

Only then can a layer see what its batch norm is added to, and the fit is the same with batch norms folded or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...plans.surgery import Fold, find_folds, fold_names
from ...plans.surgery.folding import scale_filters
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.state import evaluating
from ...tracing.trace import record_run, run_model
from .walk import Inputs

Statistics = tuple[Tensor, Tensor]


def kept_folds(dense: nn.Module, small: nn.Module, example: ExampleInput) -> tuple[Fold, ...]:
    """What could be folded in both networks, of batch norms that can express any scale and shift."""
    if not any(isinstance(module, _BatchNorm) for module in small.modules()):
        return ()  # nothing to run the networks for
    known = set(find_folds(dense, record_run(dense, example)))
    found = find_folds(small, record_run(small, example))
    return tuple(fold for fold in found if fold in known and _complete(small.get_submodule(fold.batch_norm)))


def _complete(norm: nn.Module) -> bool:
    return all(isinstance(getattr(norm, n, None), Tensor) for n in ("weight", "bias", "running_mean", "running_var"))


def take_apart(small: nn.Module, fitted: nn.Module, folds: Sequence[Fold], data: Inputs) -> None:
    """Make `small` compute in eval mode what `fitted` does, which is `small` with `folds` applied and then refitted.

    Filters keep their norms, so that a learning rate and weight decay act on them as before; running statistics become
    those of `data`, so that training starts with nearly the same function; scale and shift make up for both.
    """
    new, own = named_tensors(fitted), named_tensors(small)
    apart = {name for fold in folds for name in fold_names(fold)}
    for name in new.keys() - apart:
        if name in own:
            own[name].data.copy_(new[name])
        else:  # a bias that the fit has added
            path, _, last = name.rpartition(".")
            added = new[name]
            assert isinstance(added, nn.Parameter)
            small.get_submodule(path).register_parameter(last, added)
    measured = _measure(fitted, folds, data)
    for fold in folds:
        _put_norm(small, fold, _put_filters(small, fold, new), new[fold_names(fold)[1]], measured.get(fold))


def _put_filters(small: nn.Module, fold: Fold, new: dict[str, Tensor]) -> Tensor:
    """Fitted filters with the norms, and the signs of the scales, that there were; what to multiply results by."""
    layer = small.get_submodule(fold.layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    wanted = new[fold_names(fold)[0]].detach().double()
    was, now = (_filter_norms(w, fold, layer) for w in (weight.detach().double(), wanted))
    factor = torch.where((was > 0) & (now > 0), was / now.clamp_min(1e-300), 1.0)
    scale: Tensor = small.get_submodule(fold.batch_norm).weight  # type: ignore[assignment]
    factor = torch.where(scale.detach() < 0, -factor, factor)
    weight.data.copy_(scale_filters(wanted, factor, fold.axis, layer))
    return 1 / factor


def _filter_norms(weight: Tensor, fold: Fold, layer: nn.Module) -> Tensor:
    if fold.axis == 0:
        rows = weight.flatten(1)
    else:
        groups = int(layer.groups)  # type: ignore[arg-type]
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        rows = parts.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows.square().sum(1).sqrt()


def _put_norm(small: nn.Module, fold: Fold, slope: Tensor, fitted_bias: Tensor, measured: Statistics | None) -> None:
    """(z - mean) / sigma * scale + shift = slope * (z - bias of the layer) + fitted bias, where the layer makes z;
    `measured`: mean and variance of that result."""
    norm, layer = small.get_submodule(fold.batch_norm), small.get_submodule(fold.layer)
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    wanted = fitted_bias.detach().double()
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else 0.0
    if measured is not None:
        norm.running_mean.copy_((measured[0] - wanted) / slope + bias)
        norm.running_var.copy_(measured[1] / slope.square())
    norm.weight.data.copy_(slope * (norm.running_var.double() + norm.eps).sqrt())
    norm.bias.data.copy_(wanted + slope * (norm.running_mean.double() - bias))


def _measure(fitted: nn.Module, folds: Sequence[Fold], data: Inputs) -> dict[Fold, Statistics]:
    """Mean and variance over all data of what comes to where these batch norms were; none where nothing does."""
    sums: dict[Fold, list[Any]] = {}

    def see(fold: Fold, inputs: tuple[Tensor, ...]) -> None:
        y = inputs[0].detach().movedim(1, -1).flatten(0, -2).double()
        new = [len(y), y.sum(0), y.square().sum(0)]
        sums[fold] = [a + b for a, b in zip(sums[fold], new, strict=True)] if fold in sums else new

    handles = [
        fitted.get_submodule(fold.batch_norm).register_forward_pre_hook(lambda _, inputs, fold=fold: see(fold, inputs))
        for fold in folds
    ]
    try:
        with evaluating(fitted):
            for example in data.inputs():
                run_model(fitted, example.clone(), "data")
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for fold, (rows, total, squares) in sums.items():
        mean = total / rows
        variance = (squares - total * mean).clamp_min(0) / max(rows - 1, 1)
        if bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            found[fold] = mean, variance
    return found
