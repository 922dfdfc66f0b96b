"""The pruned structure from the dense network: the plans of a file, applied in their order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.walking import all_modules, named_tensors
from ..history import Applied, histories, history_of
from .filling import takes_bias


def rebuilt(model: nn.Module, histories: Mapping[str, tuple[Applied, ...]]) -> nn.Module:
    """`model` after the plans of each module. `model` itself may be changed where only its parts were pruned.

    A part may have been pruned before or after the whole: the order between modules is the one in which the plans fit.
    """
    pending = {path: list(_left(model, path, plans)) for path, plans in histories.items()}
    while any(pending.values()):
        failures = []
        for path, plans in pending.items():
            if not plans:
                continue
            module = _module(model, path)
            given = _give_biases(module, plans[0].structure)
            try:
                plans[0].check(module)
            except GraphPruneError as error:
                for layer in given:
                    layer._parameters["bias"] = None
                failures.append(f"{error}{f' (in {path})' if path else ''}")
                continue
            model = _with(model, path, plans.pop(0).apply(module))
            break
        else:
            raise GraphPruneError(failures[0])
    return model


def _give_biases(module: nn.Module, structure: Mapping[str, tuple[int, ...]]) -> list[nn.Module]:
    """Fill the empty places in which the next plan found a bias: the repair after an earlier one may have given it."""
    named, modules = named_tensors(module), all_modules(module)
    given = []
    for name in structure if histories(module) else ():
        path, _, last = name.rpartition(".")
        layer = modules.get(path)
        if name in named or last != "bias" or layer is None or not takes_bias(layer, last, tuple(structure[name])):
            continue
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            zeros = torch.zeros(structure[name], dtype=weight.dtype, device=weight.device)
            layer._parameters["bias"] = nn.Parameter(zeros, requires_grad=weight.requires_grad)
            given.append(layer)
    return given


def _left(model: nn.Module, path: str, plans: tuple[Applied, ...]) -> tuple[Applied, ...]:
    """The plans that have not been applied: the model may be built pruned in part."""
    known = history_of(_module(model, path))
    done = len(known.plans) if known is not None else 0
    if known is not None and [p.removed for p in known.plans] != [p.removed for p in plans[:done]]:
        raise GraphPruneError(f"{path or 'the model'} has been pruned already, and otherwise than in the file")
    return plans[done:]


def _module(model: nn.Module, path: str) -> nn.Module:
    found = all_modules(model).get(path)
    if found is None:
        raise GraphPruneError(f"the file describes another model: this one has no module {path}")
    return found


def _with(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """`model` with `new` in the place of the module at `path`, under all its paths."""
    if not path:
        return new
    modules = all_modules(model)
    old = modules[path]
    for parent in modules.values():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model
