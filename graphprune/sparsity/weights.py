"""Which tensors of a model can be masked: found once each, wherever and however often they are registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..errors import GraphPruneError
from ..support.types import Ignore, Parts
from ..support.walking import all_modules, named_tensors
from ..tracing.matching import NameTable, items_of

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Mask(nn.Module):
    """The parametrisation that holds pruned weights at zero: `mask` is true where a weight stays.

    What is pruned is exactly +0, whatever an optimiser does to the tensor behind it, NaN included, and its gradient is
    zero. (A product with 0 and 1 would give -0 for negative weights and NaN for infinite ones.)
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where `mask` is false."""
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `module.weight = value` stores."""
        return weight


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place where a weight is registered: `getattr(module, attribute)` is what the network computes with."""

    name: str
    module: nn.Module
    attribute: str


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A tensor with all the places it is registered at; the first one names it."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """Its first name, as in a state dict without masks: "layer1.0.conv1.weight"."""
        return self.sites[0].name

    @property
    def value(self) -> Tensor:
        """What the network computes with: masks and other parametrisations applied, without gradient."""
        with torch.no_grad():
            tensor: Tensor = getattr(self.sites[0].module, self.sites[0].attribute)
        return tensor.detach()

    @property
    def mask(self) -> Tensor | None:
        """Boolean, true where a weight stays; None without a mask."""
        found = mask_at(self.sites[0])
        return None if found is None else found.mask


def mask_at(site: Site) -> Mask | None:
    """The mask registered at a site."""
    return next((step for step in steps_of(site.module).get(site.attribute, ()) if isinstance(step, Mask)), None)


def steps_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrisations of a module by the name of the tensor they make."""
    if not parametrize.is_parametrized(module):
        return {}
    found = cast(nn.ModuleDict, module.parametrizations)
    return cast("dict[str, parametrize.ParametrizationList]", dict(found.items()))


def find_weights(model: nn.Module) -> list[Weight]:
    """Every floating-point parameter of the model, once each, parametrised ones included."""
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[tuple[int, ...], dict[tuple[int, str], Site]] = {}
    inner = {id(m) for module in model.modules() for m in _parametrisations(module)}
    for path, module in all_modules(model).items():
        if id(module) in inner:
            continue
        prefix = path + "." if path else ""
        for attribute, key in _tensors_of(module):
            places = found.setdefault(key, {})
            places.setdefault((id(module), attribute), Site(prefix + attribute, module, attribute))
    return [Weight(tuple(places.values())) for places in found.values()]


def _parametrisations(module: nn.Module) -> Iterable[nn.Module]:
    """Modules that only compute a tensor of `module`, whose own parameters have no life of their own."""
    if parametrize.is_parametrized(module):
        yield from cast(nn.ModuleDict, module.parametrizations).modules()


def _tensors_of(module: nn.Module) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names of a module's floating-point parameters with the identity of what is behind them."""
    for attribute, parameter in module._parameters.items():
        if parameter is None:
            continue
        if is_lazy(parameter):
            raise GraphPruneError(f"{attribute} of {type(module).__name__} has no shape yet; run the model once first")
        if parameter.is_floating_point():
            yield attribute, (id(parameter),)
    for attribute, steps in steps_of(module).items():
        behind = tuple(id(p) for n, p in steps._parameters.items() if n.startswith("original"))
        if behind:
            # the same parameter behind different computations is two different weights
            yield attribute, behind + tuple(id(step) for step in steps if not isinstance(step, Mask))


def is_weight(weight: Weight) -> bool:
    """Whether a layer multiplies by it: no bias, no vector, no parameter of a norm.

    Anything with two axes longer than 1 counts, and with two axes at all if it is called a weight.
    """
    site = weight.sites[0]
    module, attribute = site.module, site.attribute
    if "bias" in attribute.lower():
        return False
    normed = "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, _ConvNd))
    if normed or isinstance(module, _NORMS):
        return False
    if attribute.endswith("_g") and hasattr(module, attribute[:-1] + "v"):
        return False  # the lengths of the older weight norm
    shape = weight.value.shape
    return len(shape) >= 2 and ("weight" in attribute or sum(n > 1 for n in shape) >= 2)


def select_weights(
    model: nn.Module, parameters: Parts = "weights", ignore: Ignore = ()
) -> list[Weight]:
    """The weights that are meant by `parameters` without those meant by `ignore`.

    `parameters`: "weights" (no biases, no vectors, no parameters of norms), "all", or modules, parameters, names and
    patterns. Modules (`"layer3"`, `"layer3.*"`) mean their weights, parameters (`"fc.bias"`, `"*.bias"`) just these.
    Raises GraphPruneError for names that match nothing, for an empty choice, and for weights without data.
    """
    weights = find_weights(model)
    table = _table(model, weights)
    if isinstance(parameters, str) and parameters == "weights":
        chosen = [w for w in weights if is_weight(w)]
    elif isinstance(parameters, str) and parameters == "all":
        chosen = weights
    else:
        chosen = _chosen(weights, table, parameters)
    dropped = table.all_meant(ignore, "ignore")
    chosen = [w for w in chosen if w.name not in dropped and w.value.numel()]
    if not chosen:
        raise GraphPruneError(
            f"{type(model).__name__}: there is no weight to prune; see model.named_parameters(), and the arguments "
            f"parameters and ignore"
        )
    for weight in chosen:
        if weight.value.is_meta:
            raise GraphPruneError(f"{weight.name} is on the meta device and has no values; load the weights first")
    return chosen


def as_names(model: nn.Module, argument: Parts, where: str) -> str | list[str]:
    """What such an argument says, as names and patterns, which can be stored."""
    return argument if isinstance(argument, str) else _table(model, find_weights(model)).texts(argument, where)


def _table(model: nn.Module, weights: Sequence[Weight]) -> NameTable:
    """The names of modules and tensors as users know them: of what a parametrisation computes, that of its result."""
    modules = all_modules(model)
    tensors = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    sites = {site.name: id(weight.sites[0]) for weight in weights for site in weight.sites}
    objects = {id(module): path for path, module in reversed(modules.items())}
    for weight in weights:
        objects |= {id(p): weight.name for p in _behind(weight.sites[0])}
    buffers = {name: key for name, key in tensors.items() if name not in sites}
    return NameTable({path: id(module) for path, module in modules.items()}, {**buffers, **sites}, objects)


def _behind(site: Site) -> list[Tensor]:
    """The parameters that a weight is, or is computed from."""
    steps = steps_of(site.module).get(site.attribute)
    found = [site.module._parameters.get(site.attribute)] if steps is None else steps._parameters.values()
    return [p for p in found if p is not None]


def _chosen(weights: Sequence[Weight], table: NameTable, parameters: Parts) -> list[Weight]:
    """Weights that are meant: where a module is, nothing but its weights, and parameters of any kind themselves."""
    named = {site.name for w in weights for site in w.sites}
    chosen: set[str] = set()
    for item in items_of(parameters, "parameters"):
        meant = table.meant(item, "parameters")
        inside = isinstance(item, str) and item.rpartition(".")[2] == "*"  # "layer3.*": what is in a module
        found = {
            w.name for w in weights if w.name in meant and ((meant[w.name] in named and not inside) or is_weight(w))
        }
        if not found:
            what = repr(item) if isinstance(item, str) else type(item).__name__
            raise GraphPruneError(f"parameters: {what} means no weights; name the parameters themselves, or \"all\"")
        chosen |= found
    return [w for w in weights if w.name in chosen]
