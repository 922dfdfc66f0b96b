"""save() and load(): a pruned model as one file, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...errors import GraphPruneError
from ...support.doors import door
from ...support.types import PathLike
from ...support.unwrapping import checked_model, no_model
from ..history import changed_since, histories, note_repairs
from ..surgery import clone_with
from .container import ModelFile, write_file
from .document import Document
from .filling import fill
from .rebuilding import rebuilt
from .state import State


@door("model")
def save(model: nn.Module, path: PathLike) -> Path:
    """Write `model` to one safetensors file, with everything that `load` needs to rebuild its pruned structure from the
    dense network; returns the path.

    The file holds all parameters and buffers of the state dict as they are now - fine-tuned, in their types - shared
    ones once, and in its metadata the plans that were applied to the model or to parts of it, in order: those of
    `prune`, `Plan.apply`, `fold_conv_bn` and `recover`. A model that was never pruned can be saved too. Any reader of
    safetensors can read the weights; docs/model-format.md describes the rest. No pickle. A file that is already at
    `path` is replaced only once the new one is complete.

    `torch.compile` and data-parallel wrappers are left out: the module inside is saved.

    Raises GraphPruneError for tensors that cannot be stored (on the meta device, quantised, sparse), for modules with
    extra state, for a model whose tensors were given other names or shapes since it was pruned, which nothing could
    rebuild, and when the path cannot be written.
    """
    changed = changed_since(model)
    if changed:
        raise GraphPruneError(
            f"the model was changed after it was pruned ({changed}), so that load could not rebuild it from the dense "
            f"network; make such changes before pruning, or save the pruned part alone"
        )
    state = State.of(model)
    known = histories(model)
    plans = {name: history.plans for name, history in known.items()}
    repairs = {name: history.repairs for name, history in known.items()}
    return write_file(path, state.values(), Document(plans, state.aliases, state.transient, repairs))


@door()
def load(
    path: PathLike,
    build_model: Callable[[], nn.Module] | nn.Module,
    *,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The model that `save` wrote to `path`, rebuilt from the dense network.

    `build_model`: a function without arguments that returns the dense network (its weights do not matter), or that
    network itself, which is not touched. The file's plans are applied to it and its weights put in: parameters and
    buffers, their types and sharing are those that were saved, bit for bit, on whatever device they were then. Training
    mode, `requires_grad`, hooks, and buffers that are in no state dict are those of `build_model`'s result.

    `device`: where the result goes, such as "cpu" or "cuda:0"; by default each tensor goes where `build_model` put it.

    Raises GraphPruneError, naming the file, when it is missing, damaged or made to mislead, when `build_model` fails,
    when the dense network is another one (the first parameter that differs is named), and when there is no such device.
    """
    file = ModelFile(path)
    target = _device(device)
    try:
        model = rebuilt(_built(build_model), file.description.histories)
        fill(model, file)
        note_repairs(model, file.description.repairs)
        return model if target is None else model.to(target)
    except GraphPruneError as error:
        raise GraphPruneError(f"{file.path}: {error}") from error


def _built(build_model: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(build_model, nn.Module):
        return clone_with(checked_model(build_model, "build_model"), {})
    if not callable(build_model):
        raise no_model(build_model, "build_model", "a function or a torch.nn.Module")
    try:
        made = build_model()
    except Exception as error:
        raise GraphPruneError(f"build_model failed: {type(error).__name__}: {error}") from error
    return checked_model(made, "what build_model returned")


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise GraphPruneError(f"device: {device!r} cannot be used here: {reason}") from error
    if found.type == "meta":
        raise GraphPruneError("device: tensors on the meta device have no values; load to another device")
    return found


__all__ = ["load", "save"]
