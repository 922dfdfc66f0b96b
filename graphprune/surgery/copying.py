"""Copies of a model in which some tensors are others. Nothing is copied twice, nothing of the original is touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError


def clone_with(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model` with the named parameters and buffers replaced by `tensors`.

    Replaced tensors are not copied first. Shared parameters stay shared, `requires_grad` and memory format stay, hooks
    and attributes are copied as `copy.deepcopy` does. A name that does not exist yet (a bias that folding adds) becomes
    a parameter of its module.
    """
    memo: dict[int, Any] = {}
    keep: list[Any] = []
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    added: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = named.get(name)
        if old is None:
            added[name] = tensor
            continue
        memo[id(old)] = _like(old, tensor)
    _memoise_plain_tensors(model, memo, keep)
    try:
        out = copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphPruneError(
            f"the model cannot be copied with copy.deepcopy ({type(error).__name__}: {error}); make its attributes "
            f"copyable (no open files, locks, or tensors that are results of a computation)"
        ) from error
    for name, tensor in added.items():
        path, _, attribute = name.rpartition(".")
        module = out.get_submodule(path)
        weight = getattr(module, "weight", None)
        requires_grad = bool(weight.requires_grad) if isinstance(weight, Tensor) else True
        module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=requires_grad))
    return out


def _like(old: Tensor, new: Tensor) -> Tensor:
    """`new` as the same kind of object as `old`."""
    if old.dim() in (4, 5):
        last = torch.channels_last if old.dim() == 4 else torch.channels_last_3d
        if old.is_contiguous(memory_format=last) and not old.is_contiguous():
            new = new.contiguous(memory_format=last)
    if isinstance(old, nn.Parameter):
        made: Tensor = nn.Parameter(new, requires_grad=old.requires_grad)
    elif isinstance(old, nn.Buffer):
        made = nn.Buffer(new, persistent=old.persistent)
    else:
        made = new.requires_grad_(old.requires_grad) if old.requires_grad else new
    for key, value in old.__dict__.items():
        if key != "_graphprune_node" and not hasattr(made, key):
            setattr(made, key, value)
    return made


def _memoise_plain_tensors(model: nn.Module, memo: dict[int, Any], keep: list[Any]) -> None:
    """deepcopy refuses tensors that are results of a computation (the old weight_norm keeps one); copy their values."""
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
                keep.append(value)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` wherever the module at `path` is registered."""
    old = model.get_submodule(path)
    new.train(old.training)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                parent._modules[name] = new
