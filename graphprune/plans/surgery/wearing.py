"""Put back what computed a model's weights: on what surgery made of its plain twin."""

from __future__ import annotations

import collections
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...dependency.reparametrised import Reparametrised, forget, plain, reparametrised
from ...errors import GraphPruneError
from ...support.walking import all_modules, first_names

Removed = Mapping[str, Mapping[int, Sequence[int]]]


def worn(small: nn.Module, removed: Removed) -> nn.Module:
    """`small`, made from a plain model by cutting `removed`, with its weights computed as the user's model computes
    them, in place: the same parametrisations and hooks, of smaller tensors.

    Raises GraphPruneError for a weight that cannot be computed so.
    """
    for path, module in first_names(all_modules(small)).items():
        weights = reparametrised(module)
        forget(module)
        if weights:
            wanted = {w.attribute: getattr(module, w.attribute).detach() for w in weights}
            _wear(module, weights, removed)
            _check(path, module, weights, wanted)
    return small


def _wear(module: nn.Module, weights: Sequence[Reparametrised], removed: Removed) -> None:
    users = weights[0].module
    plain_kind = type(users).__bases__[0] if weights[0].hook is None else type(users)
    if type(module) is not plain_kind:
        raise GraphPruneError(
            f"{weights[0].name} is computed by {weights[0].form.title} of a {plain_kind.__name__}, which becomes a "
            f"{type(module).__name__}; make the weight permanent first, or leave it out with ignore"
        )
    memo: dict[int, Any] = {id(users): module}
    for weight in weights:
        held = module._parameters.pop(weight.attribute, None)
        value = module._buffers.pop(weight.attribute) if held is None else held
        assert value is not None
        memo.update(_replaced(weight, value.detach(), removed.get(weight.name, {})))
        for table, there in _tables(module, users):
            table.update((name, memo[id(old)]) for name, old in there.items() if id(old) in memo)
    for weight in weights:
        if weight.hook is not None:
            _hang(module, weight)
    if weights[0].hook is None:
        module._modules["parametrizations"] = copy.deepcopy(users._modules["parametrizations"], memo)
        module.__class__ = type(users)
    for table, there in _tables(module, users):  # in the user's order
        for name in [n for n in there if n in table] + [n for n in table if n not in there]:
            table[name] = table.pop(name)


def _tables(module: nn.Module, users: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where both keep their parameters and their buffers."""
    return [(module.__dict__[name], users.__dict__[name]) for name in ("_parameters", "_buffers")]


def _replaced(weight: Reparametrised, value: Tensor, axes: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """The identity of everything that the weight is computed from -> what takes its place."""
    sources = weight.form.sources()
    same = not axes and (value.is_meta or torch.equal(value, weight.form.value()))
    new = sources if same else weight.form.tensors(value, axes)
    out: dict[int, Tensor] = {}
    for name, old in sources.items():
        made = new[name].detach().clone(memory_format=torch.preserve_format)
        if isinstance(old, nn.Parameter):
            made = nn.Parameter(made, requires_grad=old.requires_grad)
        made.__dict__.update(copy.copy(old.__dict__))
        out[id(old)] = made
    return out


def _hang(module: nn.Module, weight: Reparametrised) -> None:
    """The hook of torch's older functions, in its old place among the others."""
    there, here = weight.module._forward_pre_hooks, module._forward_pre_hooks
    mine = copy.deepcopy(there[weight.hook])  # type: ignore[index]
    order = [key for key in there if key in here or key == weight.hook]
    module._forward_pre_hooks = collections.OrderedDict(
        (key, mine if key == weight.hook else here[key]) for key in [*order, *(k for k in here if k not in there)]
    )
    now = plain_value(module, weight.attribute)
    module.__dict__[weight.attribute] = now


def plain_value(module: nn.Module, attribute: str) -> Tensor:
    """The value in eval mode of a weight that the module computes."""
    found: Tensor = getattr(plain(module), attribute)
    return found.detach()


def _check(
    path: str, module: nn.Module, weights: Sequence[Reparametrised], wanted: Mapping[str, Tensor]
) -> None:
    """Raise GraphPruneError unless the module computes these weights."""
    for weight in weights:
        want = wanted[weight.attribute]
        if want.is_meta:
            continue
        found = plain_value(module, weight.attribute).to(want.dtype)
        limit = max(1e-5, 8 * torch.finfo(want.dtype).eps)
        off = float((found - want).double().norm())
        if found.shape != want.shape or not off <= limit * float(want.double().norm()):
            raise GraphPruneError(
                f"{path or 'the model'}: the weights that the plan leaves are none that {weight.form.title} can "
                f"compute; make {weight.name} permanent first, or leave it out with ignore"
            )


__all__ = ["plain_value", "worn"]

