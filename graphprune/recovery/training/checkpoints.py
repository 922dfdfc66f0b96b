"""How far a training has come, as a safetensors file: no pickle, written to another name first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.runs import Checkpoint, read_run, write_run
from ...support.types import PathLike
from ...support.walking import named_tensors

_KEY = "graphprune.training/3"


def write_checkpoint(path: PathLike, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the file by one of this state. Raises GraphPruneError when it cannot be written."""
    write_run(path, _KEY, about, tensors)


def read_checkpoint(path: PathLike, settings: Mapping[str, Any]) -> Checkpoint | None:
    """What `write_checkpoint` wrote, None where there is no file.

    Raises GraphPruneError if the file is damaged, or of a run with other settings, naming one.
    """
    return read_run(path, _KEY, settings)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, persistent or not, each once under its first name."""
    out: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named_tensors(model).items():
        out.setdefault(id(tensor), (name, tensor))
    return dict(out.values())


def model_state(model: nn.Module, part: str = "model") -> dict[str, Tensor]:
    """The tensors of a model, by `part` and name."""
    return {f"{part}/{name}": tensor for name, tensor in own_tensors(model).items()}


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], what: str, part: str = "model") -> None:
    """Copy tensors into the model's own. Raises GraphPruneError, changing nothing, where they do not fit."""
    stored = check_fit(model, tensors, what, part)
    with torch.no_grad():
        for name, tensor in own_tensors(model).items():
            tensor.copy_(stored[name])


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], what: str, part: str = "model") -> dict[str, Tensor]:
    """The tensors of that part by name. Raises GraphPruneError unless they are those of the model."""
    own = own_tensors(model)
    stored = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
    for name in own.keys() | stored.keys():
        fits = name in own and name in stored and own[name].shape == stored[name].shape
        if not fits or own[name].dtype != stored[name].dtype:
            raise GraphPruneError(f"{what} is damaged or of another model: {name} does not fit")
    return stored


def check_others(others: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise GraphPruneError unless the file has just these tensors "other/..." of the optimizer."""
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("other/")}
    for name in others.keys() | stored.keys():
        if name not in others or name not in stored or others[name].shape != stored[name].shape:
            raise GraphPruneError(f"{what} is of another run: the optimizer trains other parameters beside the model's")


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The state of every parameter by name: plain values, and tensors as "optimizer/<parameter>/<key>". `named`: all
    that the optimizer trains is among them."""
    names = {id(tensor): name for name, tensor in named.items()}
    plain: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        values = plain.setdefault(name, {})
        for key, value in state.items():
            stored = value if isinstance(value, list) else [value]
            if not all(isinstance(v, (Tensor, bool, int, float, str, type(None))) for v in stored):
                raise GraphPruneError(
                    f"checkpoint: {type(optimizer).__name__} keeps a {type(value).__name__} as {key!r}, which cannot "
                    f"be stored; train without checkpoint, or with another optimizer"
                )
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif isinstance(value, list):  # as LBFGS has: what is no tensor stays in its place
                values[key] = [None if isinstance(v, Tensor) else v for v in value]
                tensors |= {f"optimizer/{name}/{key}:{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)}
            else:
                values[key] = value
    return plain, tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> None:
    """The inverse of `optimizer_state`; options of the parameter groups stay as they are.

    Raises GraphPruneError, changing nothing, for state of what the optimizer does not train.
    """
    names = {id(tensor): name for name, tensor in named.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    stored: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, what = key.removeprefix("optimizer/").rpartition("/")
            held, (what, _, place) = stored.setdefault(name, {}), what.partition(":")
            if place:
                held[what] = [tensor if i == int(place) else v for i, v in enumerate(held[what])]
            else:
                held[what] = tensor
    for name in stored:
        if name not in order:
            raise GraphPruneError(f"it holds state of the optimizer for {name!r}, which is not trained")
    packed = optimizer.state_dict()
    packed["state"] = {i: stored[name] for i, name in enumerate(order) if name in stored}
    optimizer.load_state_dict(packed)
