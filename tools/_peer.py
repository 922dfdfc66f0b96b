"""Torch-Pruning, used as its documentation says, and a check of whether what it returns is right."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.tracing.example import ExampleInput, flatten_tensors
from tools._common import classifier_of, parameters_in, relative_difference


def differentiable(outputs: Any) -> list[Tensor]:
    """The tensors that a model returned and that have a gradient: those the library can follow back."""
    return [t for t in flatten_tensors(outputs) if t.requires_grad]


def prune_in_place(model: nn.Module, example: Any, ratio: float, ignored: Sequence[str] | None = None) -> Any:
    """Build the dependency graph of `model`, prune it, return the pruner: the plain use of the library.

    `ignored`: paths of the modules that make the output; None for the classifier of a torchvision network.
    """
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[classifier_of(model)] if ignored is None else [model.get_submodule(p) for p in ignored],
        global_pruning=False,
        output_transform=differentiable,
        # The defaults of these two are dicts that all pruners of a process would share.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    return pruner


def surviving(model: nn.Module, example: Any, history: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """For every tensor of `model`, the flat indices of the elements that the recorded pruning leaves.

    The record is replayed on a copy whose elements are their own indices.
    """
    numbered = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            numbered, example_inputs=example, output_transform=differentiable
        )
    with torch.no_grad():
        for tensor in (*numbered.parameters(), *numbered.buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    graph.load_pruning_history(history)
    named = {**dict(numbered.named_parameters()), **dict(numbered.named_buffers())}
    return numbered, {n: t.detach().flatten().long() for n, t in named.items() if t.is_floating_point()}


class _MaskedNorm(nn.Module):
    """LayerNorm over the last axis whose statistics run over the surviving channels only."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor, channels_first: bool) -> None:
        super().__init__()
        self.norm = norm
        self.kept = kept
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.channels_first else x
        part = F.layer_norm(x[..., self.kept], (len(self.kept),), eps=self.norm.eps)
        y = torch.zeros_like(x)
        y[..., self.kept] = part
        if self.norm.weight is not None:
            y = y * self.norm.weight + self.norm.bias
        return y.permute(0, 3, 1, 2) if self.channels_first else y


@torch.no_grad()
def zeroed(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """A copy of `model` with everything that is not kept set to zero; norms over channels leave those out."""
    copied = copy.deepcopy(model)
    named: dict[str, Tensor] = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    for name, indices in kept.items():
        tensor = named[name]
        if len(indices) < tensor.numel() and not name.endswith("running_var"):
            values = torch.zeros_like(tensor).flatten()
            values[indices] = tensor.flatten()[indices]
            tensor.copy_(values.reshape(tensor.shape))
    for name, module in list(copied.named_modules()):
        if "Norm" not in type(module).__name__ or isinstance(module, _BatchNorm):
            continue
        own_tensors = [(kept.get(f"{name}.{n}"), p.numel()) for n, p in module.named_parameters(recurse=False)]
        if all(left is None or len(left) == number for left, number in own_tensors):
            continue
        if isinstance(module, nn.LayerNorm):
            first = type(module).__name__ == "LayerNorm2d" or getattr(module, "data_format", "") == "channels_first"
            masked = _MaskedNorm(module, kept[f"{name}.weight"], first)
            parent, _, own = name.rpartition(".")
            setattr(copied.get_submodule(parent), own, masked)
        else:  # its statistics run over other channels now, and setting the cut ones to zero is no reference
            raise RuntimeError(f"no reference for a {type(module).__name__} that lost channels")
    return copied


def _joined(model: nn.Module, arguments: ExampleInput) -> Tensor:
    """Everything in floating point that the model returns, in one vector."""
    outputs = flatten_tensors(arguments.clone().call(model))
    return torch.cat([t.flatten().double() for t in outputs if t.is_floating_point()])


@torch.no_grad()
def error_of(original: nn.Module, pruned: nn.Module, example: Any, history: Any) -> float:
    """Relative difference between the pruned network and the original with the same slices zeroed.

    In double precision where the network allows it: only real differences survive in that.
    """
    replayed, kept = surviving(original, example, history)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (replayed, pruned)]
    if shapes[0] != shapes[1]:
        raise RuntimeError("its record, replayed, does not give the same shapes")
    reference = zeroed(original, kept)
    arguments = ExampleInput.of(example)
    double = arguments.map(lambda t: t.double() if t.is_floating_point() else t)
    try:
        return relative_difference(_joined(copy.deepcopy(pruned).double(), double), _joined(reference.double(), double))
    except RuntimeError:  # the code asks for single precision somewhere
        return relative_difference(_joined(pruned, arguments), _joined(reference.float(), arguments))


def first_line(error: BaseException) -> str:
    """What an exception says first, in one line of at most 240 characters."""
    if isinstance(error, MemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    if not lines and frames:
        lines = [f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line}"]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:240]


def examine(original: nn.Module, example: Any, ratio: float, ignored: Sequence[str] | None = None) -> dict[str, Any]:
    """Prune a copy and say how it went: failed at which stage, or how much was removed and whether it is right."""
    found: dict[str, Any] = {"parameters": parameters_in(original), "stage": "pruning"}
    model = copy.deepcopy(original)
    arguments = ExampleInput.of(example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = prune_in_place(model, example, ratio, ignored)
        found["left"] = parameters_in(model)
        found["stage"] = "forward"
        with torch.no_grad():
            shapes = [[tuple(t.shape) for t in flatten_tensors(arguments.clone().call(m))] for m in (original, model)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(f"the outputs have shapes {shapes[1]} instead of {shapes[0]}")
        found["stage"] = "backward"
        outputs = differentiable(arguments.clone().call(model))
        torch.stack([t.square().sum() for t in outputs]).sum().backward()
        model.zero_grad()
        found["stage"] = "done"
    except Exception as error:
        found["failure"] = first_line(error)
        return found
    try:
        found["error"] = error_of(original, model, example, pruner.pruning_history())
    except Exception as error:
        found["unchecked"] = first_line(error)
    return found
