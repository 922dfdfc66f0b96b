"""Unstructured pruning by the gradient of a loss over data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..importance.calibration import ONE_INPUT, CalibrationData, batch_loss
from ..plans.surgery.copying import clone_with
from ..support.doors import door
from ..support.suggestions import check_choice
from ..support.types import Ignore, LossFunction, Parts
from ..tracing.trace import run_model
from .masks import make_plain, put_in_force
from .ranking import Scope, check_scope, check_sparsity, keep_highest
from .weights import Weight, find_weights, select_weights


@door("model", in_place=True)
def gradient(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    sparsity: float,
    scope: Scope = "global",
    *,
    times_weight: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    parameters: Parts = "weights",
    ignore: Ignore = (),
) -> nn.Module:
    """Mask the weights whose loss gradient is smallest, and return the model, which is changed in place.

    The score is `|dL/dw|`, or with `times_weight` `|w dL/dw|`: to first order, the change of the loss when w is set to
    zero (Molchanov et al., 2017; at initialisation, SNIP, Lee et al., 2019). L is the loss over *all* of `data`:
    gradients are added up with their signs, so that the result does not depend on how the data are cut into batches.

    - `data`: batches `(inputs, targets)`, or dicts of keyword arguments. Inputs are a tensor, a tuple of positional
      arguments or a dict; tensors are moved to the model's device. Each batch is used once, so a generator will do.
    - `loss_fn(output, targets)`: one number; for dicts it gets the output and the dict. None: cross-entropy of logits
      and class numbers, or, without targets, the loss that the model returns itself (`output.loss`).
    - `reduction`: "mean" (default) if `loss_fn` averages over the batch: batches then count by their length (the first
      axis of the first tensor of the inputs); "sum" if it adds up.
    - the other arguments are those of `magnitude`.

    The data go through a copy of the model in eval mode: gradients, running statistics and modes of yours stay.
    Weights that the loss does not depend on score zero.

    Raises GraphPruneError, with the model as it was, as `magnitude` does, and for data without batches or of another
    form, a loss that is not one finite number, and a model that fails.
    """
    wanted = check_sparsity(sparsity)
    check_scope(scope)
    check_choice("reduction", reduction, ("mean", "sum"))
    weights = select_weights(model, parameters, ignore)
    gradients = loss_gradients(model, weights, data, loss_fn, mean=reduction == "mean")
    scores = [(g * w.value if times_weight else g).abs() for g, w in zip(gradients, weights, strict=True)]
    put_in_force(keep_highest(weights, scores, wanted, scope))
    return model


def loss_gradients(
    model: nn.Module, weights: list[Weight], data: Iterable[Any], loss_fn: LossFunction | None, *, mean: bool
) -> list[Tensor]:
    """dL/dw of the values that the network computes with, in at least float32; up to a common positive factor."""
    copied = clone_with(model, {}).eval()
    for weight in find_weights(copied):
        make_plain(weight)  # a gradient with respect to what masks and weight norm give, not to what they are made of
    copied.requires_grad_(False)
    by_name = {site.name: w for w in find_weights(copied) for site in w.sites}
    leaves = [_parameter(by_name[weight.name]).requires_grad_() for weight in weights]
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in leaves]
    # cuDNN's recurrent layers have no backward pass in eval mode
    recurrent = any(isinstance(module, nn.RNNBase) for module in copied.modules())
    cudnn = torch.backends.cudnn.enabled and not recurrent
    for index, (inputs, targets) in enumerate(CalibrationData(data, ONE_INPUT, copied, once=True)):
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=cudnn):
            loss = batch_loss(loss_fn, run_model(copied, inputs, "data"), inputs, targets, index)
            _check(loss)
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        size = inputs.samples
        for total, part in zip(sums, found, strict=True):
            if part is not None:
                total.add_(part, alpha=size if mean else 1)
    return sums


def _parameter(weight: Weight) -> nn.Parameter:
    site = weight.sites[0]
    found = site.module._parameters[site.attribute]
    assert found is not None
    return found


def _check(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise GraphPruneError(f"loss_fn: the loss is {loss.item()}; check the data and the weights")
    if not loss.requires_grad:
        raise GraphPruneError("loss_fn: the loss does not depend on the weights (is it detached?)")
