"""Masks in force: set, read, and made permanent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import GraphPruneError
from ..support.doors import door
from .weights import Mask, Site, Weight, find_weights, mask_at, steps_of


@door("model")
def masks(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the masks in force: name of the weight ("fc.weight") -> boolean tensor, true where a weight stays."""
    return {w.name: w.mask.clone() for w in find_weights(model) if w.mask is not None}


@door("model", in_place=True)
def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Put masks in force, replacing the ones of the same weights, and return the model, which is changed in place.

    `masks`: name of a weight -> boolean tensor of its shape, true where a weight stays. From here on the network
    computes with zeros in the other places, in training too; parameters keep their identity, so an optimiser made
    before goes on working. A weight that is registered in several places is masked in all of them. `parameters()` lists
    masked weights after the others of their module: an optimiser's state dict, which counts parameters in that order,
    belongs to a model masked alike.

    Raises GraphPruneError for unknown names, wrong shapes and tensors that are not boolean; then nothing is changed.
    """
    by_name = {site.name: w for w in find_weights(model) for site in w.sites}
    work = []
    for name, mask in masks.items():
        weight = by_name.get(name)
        if weight is None:
            raise GraphPruneError(f"masks: the model has no floating-point parameter {name!r}")
        shape = tuple(weight.value.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise GraphPruneError(f"masks: {name} needs a boolean tensor of shape {shape}, got {found}")
        work.append((weight, mask))
    put_in_force(work)
    return model


def put_in_force(work: Sequence[tuple[Weight, Tensor]]) -> None:
    """Register or replace the masks of weights; all of them or, after an error, none."""
    added: list[Site] = []
    try:
        for weight, mask in work:
            if weight.mask is None:
                _register(weight, mask, added)
    except GraphPruneError:
        for site in added:
            _unregister(site)
        raise
    with torch.no_grad():
        for weight, mask in work:
            for found in {id(m): m for s in weight.sites if (m := mask_at(s)) is not None}.values():
                found.mask.copy_(mask)


def _register(weight: Weight, mask: Tensor, added: list[Site]) -> None:
    value = weight.value
    # One module for all places, so that they cannot come apart; laid out in memory as the weight is.
    shared = Mask(torch.empty_like(value, dtype=torch.bool).copy_(mask))
    for site in weight.sites:
        module = site.module
        _own_class(module)
        kind, parameters = type(module), dict(module._parameters)
        try:
            parametrize.register_parametrization(module, site.attribute, shared)
        except Exception as error:  # torch has taken the parameter away already
            module.__class__ = kind
            module._parameters.update(parameters)
            raise GraphPruneError(
                f"{site.name} cannot be parametrised: {type(error).__name__}: {error}; leave it out with ignore"
            ) from error
        added.append(site)


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own.

    torch keeps the parametrised attribute as a property of a class made for the module, which copy.deepcopy shares:
    without this, taking a parametrisation off a copy would take it off the original too.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, body)


def remove_at(site: Site, *, keep_result: bool) -> None:
    """Take all parametrisations of a tensor off; the parameter becomes what they computed, or is as before them."""
    module = site.module
    _own_class(module)
    with torch.enable_grad():  # torch takes what needs no gradient for a buffer
        parametrize.remove_parametrizations(module, site.attribute, leave_parametrized=keep_result)
    frozen = module._buffers.pop(site.attribute, None)
    if frozen is not None:
        module.register_parameter(site.attribute, nn.Parameter(frozen, requires_grad=False))


def _unregister(site: Site) -> None:
    """Take off the mask that was added last, with the values as they were before."""
    steps = steps_of(site.module)[site.attribute]
    if len(steps) == 1:
        remove_at(site, keep_result=False)
    else:
        del steps[-1]


@door("model", in_place=True)
def make_permanent(model: nn.Module) -> nn.Module:
    """Turn every mask into zeros in an ordinary parameter, and return the model, which is changed in place.

    The network computes exactly what it did. Parameters keep their identity and stay shared; names in the state dict
    are the ordinary ones again. From here on training moves all weights. A masked weight that has other
    parametrisations too (weight norm) becomes an ordinary parameter as a whole, as its zeros could not be held
    otherwise.

    Structured pruning (`graphprune.prune`) leaves masked layers as they are: make the masks permanent before it.

    Raises GraphPruneError when the model has no masks.
    """
    masked = [w for w in find_weights(model) if w.mask is not None]
    if not masked:
        raise GraphPruneError(f"{type(model).__name__} has no masks to make permanent; see graphprune.sparsity")
    for weight in masked:
        make_plain(weight)
    return model


def make_plain(weight: Weight) -> None:
    """One ordinary parameter in all places, with the values that the network computed with."""
    for site in weight.sites:
        if site.attribute in steps_of(site.module):
            remove_at(site, keep_result=True)
    first = weight.sites[0]
    kept = first.module._parameters[first.attribute]
    for site in weight.sites[1:]:  # parametrisations of several tensors leave a new parameter in every place
        site.module._parameters[site.attribute] = kept
