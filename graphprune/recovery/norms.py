"""Batch norms that a plan keeps: layers are fitted as if these were folded, and taken apart again afterwards.

Only then can a layer see what its batch norm is added to, and the fit is the same with batch norms folded or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..calibration import CalibrationData
from ..surgery import Fold, find_folds, fold_names
from ..surgery.folding import scale_filters
from ..tracing.example import ExampleInput
from ..tracing.names import named_tensors
from ..tracing.state import evaluating
from ..tracing.trace import record_run, run_model


def kept_folds(dense: nn.Module, small: nn.Module, example: ExampleInput) -> tuple[Fold, ...]:
    """What could be folded in both networks, of batch norms that can express any scale and shift."""
    known = set(find_folds(dense, record_run(dense, example)))
    found = find_folds(small, record_run(small, example))
    return tuple(fold for fold in found if fold in known and _complete(small.get_submodule(fold.batch_norm)))


def _complete(norm: nn.Module) -> bool:
    return all(isinstance(getattr(norm, n, None), Tensor) for n in ("weight", "bias", "running_mean", "running_var"))


def take_apart(small: nn.Module, fitted: nn.Module, folds: Sequence[Fold], data: CalibrationData) -> None:
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
            small.get_submodule(path).register_parameter(last, nn.Parameter(new[name].detach().clone()))
    slopes = {fold: _put_filters(small, fold, new) for fold in folds}
    for fold, slope in slopes.items():
        _put_norm(small, fold, slope, new)
    _measure([_norm(small, fold) for fold in folds], small, data)
    for fold, slope in slopes.items():
        _put_norm(small, fold, slope, new)


def _norm(small: nn.Module, fold: Fold) -> _BatchNorm:
    norm = small.get_submodule(fold.batch_norm)
    assert isinstance(norm, _BatchNorm)
    return norm


def _put_filters(small: nn.Module, fold: Fold, new: dict[str, Tensor]) -> Tensor:
    """Fitted filters with the norms, and the signs of the scales, that there were; what to multiply results by."""
    layer = small.get_submodule(fold.layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    wanted = new[fold_names(fold)[0]].detach().double()
    was, now = (_filter_norms(w, fold, layer) for w in (weight.detach().double(), wanted))
    factor = torch.where((was > 0) & (now > 0), was / now.clamp_min(1e-300), 1.0)
    factor = torch.where(_norm(small, fold).weight.detach() < 0, -factor, factor)
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


def _put_norm(small: nn.Module, fold: Fold, slope: Tensor, new: dict[str, Tensor]) -> None:
    """(z - mean) / sigma * scale + shift = slope * (z - bias of the layer) + fitted bias."""
    norm, layer = _norm(small, fold), small.get_submodule(fold.layer)
    assert norm.running_mean is not None and norm.running_var is not None
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else 0.0
    shift = new[fold_names(fold)[1]].detach().double() + slope * (norm.running_mean.double() - bias)
    norm.weight.data.copy_(slope * sigma)
    norm.bias.data.copy_(shift)


def _measure(norms: Sequence[_BatchNorm], model: nn.Module, data: CalibrationData) -> None:
    """Replace running statistics by those of all data in eval mode; norms that do not run keep theirs."""
    sums: dict[_BatchNorm, list[Tensor]] = {}

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        z = inputs[0].detach().movedim(1, -1).flatten(0, -2).double()
        new = [torch.tensor(float(len(z))), z.sum(0), z.square().sum(0)]
        sums[norm] = [a + b for a, b in zip(sums[norm], new, strict=True)] if norm in sums else new

    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        with evaluating(model):
            for example in data.inputs():
                run_model(model, example.clone(), "data")
    finally:
        for handle in handles:
            handle.remove()
    for norm, (rows, total, squares) in sums.items():
        mean = total / rows.to(total.device)
        variance = (squares - total * mean).clamp_min(0) / max(float(rows) - 1, 1.0)
        if bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
