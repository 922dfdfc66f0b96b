"""Repair of batch norms after masking: no training and no labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import GraphPruneError
from ..support.doors import door
from ..tracing.example import ExampleInput

Statistics = tuple[Tensor, Tensor]


@door("model", "dense", in_place=True)
def match_statistics(model: nn.Module, dense: nn.Module, inputs: Any) -> nn.Module:
    """Set the running statistics of `model` so that its batch norms put out what those of `dense` do, on average.

    Masks shrink and shift what reaches a batch norm. For each channel, running mean and variance are changed such that
    its output over `inputs` has the mean and variance that it has in `dense`, one norm after the other, as each changes
    what the next gets. (Statistics are compared instead of measured anew, as those of images without augmentation are
    not those of training.) The model is changed in place and returned; weights stay as they are.

    `model` is `dense` after masking, with the same module names. `inputs`: a batch as large as memory allows, as a
    tensor, a tuple of positional arguments or a dict; both models run it once, in eval mode. Norms that run more than
    once or keep no statistics stay.

    Raises GraphPruneError where the norms of the two differ or a model fails, with the model as it was.
    """
    example = ExampleInput.of(inputs)
    norms = _norms(model)
    others = _norms(dense)
    if set(norms) != set(others) or any(norms[n].num_features != others[n].num_features for n in norms):
        raise GraphPruneError("match_statistics: the batch norms differ; pass the model as it was before masking")
    kept = {name: tuple(tensor.clone() for tensor in _running(norm)) for name, norm in norms.items()}
    found: dict[str, list[Statistics]] = {}

    def note(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append(_moments(x))

    def correct(name: str, x: Tensor) -> None:
        if len(found.get(name, ())) == 1:
            _correct(norms[name], others[name], _moments(x), found[name][0])

    try:
        _run(dense, others, example, note)
        _run(model, norms, example, correct)
    except Exception as error:
        for name, norm in norms.items():
            for tensor, before in zip(_running(norm), kept[name], strict=True):
                tensor.copy_(before)
        raise GraphPruneError(f"match_statistics: a model failed: {type(error).__name__}: {error}") from error
    return model


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _running(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _moments(x: Tensor) -> Statistics:
    """Mean and variance of each channel (axis 1)."""
    rest = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.float()
    return wide.mean(rest), wide.var(rest, correction=0)


def _correct(norm: _BatchNorm, dense: _BatchNorm, here: Statistics, there: Statistics) -> None:
    mean, variance = _running(dense)
    # (m' - mean') / std' = (m - mean) / std and s' / std' = s / std, where m and s are what is measured
    scale = torch.where((here[1] > 0) & (there[1] > 0), here[1] / there[1], 1.0)
    new_mean, new_variance = _running(norm)
    new_variance.copy_(((variance + dense.eps) * scale - norm.eps).clamp_min(0))
    new_mean.copy_(here[0] - (there[0] - mean) * scale.sqrt())


@torch.no_grad()
def _run(
    model: nn.Module, norms: dict[str, _BatchNorm], example: ExampleInput, visit: Callable[[str, Tensor], None]
) -> None:
    """One forward pass in eval mode; `visit` sees what each norm gets, before it runs."""
    modes = {module: module.training for module in model.modules()}
    hooks = [
        norm.register_forward_pre_hook(lambda module, args, name=name: visit(name, args[0]))
        for name, norm in norms.items()
    ]
    try:
        example.call(model.eval())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
