"""A model whose computed weights are weights: what is recorded, ranked, cut and proven in its place."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm

from ...support.walking import all_modules, first_names
from ...tracing.cloning import Unclonable, clone_modules
from ...tracing.matching import OtherNames
from ..analysis import Analysis
from ..effects import Freeze, Reason
from .forms import Form, SpectralNorm, WeightNorm
from .others import Computed

_KEY = "_graphprune_reparametrised"
# Their kernels read flat lists of weights, past what a parametrisation computes.
_PAST = (nn.RNNBase, nn.MultiheadAttention)


@dataclasses.dataclass(frozen=True, eq=False)
class Reparametrised:
    """A weight of a plain model that the user's model computes. `name`: of the weight; `attribute`: in its module.
    `module`: the user's. `hook`: the key of the hook that computes it there; None for `torch.nn.utils.parametrize`."""

    name: str
    attribute: str
    module: nn.Module
    form: Form
    hook: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Memory:
    """What a module of a plain model remembers: its weights that are computed in the user's. Copies share it."""

    weights: tuple[Reparametrised, ...] = ()

    def __copy__(self) -> _Memory:
        return self

    def __deepcopy__(self, memo: Any) -> _Memory:
        return self


def plain(model: nn.Module) -> nn.Module:
    """`model` with every computed weight as an ordinary parameter of the value that it has in eval mode; `model` itself
    where it has none.

    Modules are new and all other tensors the model's own. Left as they are, and followed through the operators that
    compute them, are weights of recurrent layers and of packed attention, weights computed from tensors that others
    use too, those that are random, and models that cannot be cloned.
    """
    modules = first_names(all_modules(model))
    if not any(_may_compute(module) for module in modules.values()):
        return model
    try:
        found = _unshared({path: made for path, module in modules.items() if (made := tuple(_weights(path, module)))})
        if not found:
            return model
        clones = clone_modules(modules, lambda tensor: tensor).modules
    except Unclonable:
        return model
    for path, weights in found.items():
        _make_plain(clones[path], weights)
    root = clones[""]
    root.__dict__.setdefault(_KEY, _Memory())
    _other_names(modules, found).put_on(root)
    return root


def _other_names(modules: Mapping[str, nn.Module], found: Mapping[str, tuple[Reparametrised, ...]]) -> OtherNames:
    """The user's own modules, and the tensors that weights are computed from."""
    names: dict[str, str] = {}
    objects = {id(module): path for path, module in modules.items()}
    for path, weights in found.items():
        prefix = f"{path}." if path else ""
        for weight in weights:
            sources = weight.form.sources()
            names.update((prefix + source, weight.name) for source in sources)
            objects.update((id(tensor), weight.name) for tensor in sources.values())
    return OtherNames(objects, names)


def reparametrised(module: nn.Module) -> tuple[Reparametrised, ...]:
    """The weights that this module of a plain model computes in the user's."""
    memory = module.__dict__.get(_KEY)
    return memory.weights if isinstance(memory, _Memory) else ()


def forms_in(model: nn.Module) -> dict[str, Form]:
    """Name of a weight of a plain model -> how the user's model computes it."""
    if _KEY not in model.__dict__:
        return {}
    return {
        f"{path}.{w.attribute}" if path else w.attribute: w.form
        for path, module in all_modules(model).items()
        for w in reparametrised(module)
    }


def forget(module: nn.Module) -> None:
    """The module is the user's again."""
    module.__dict__.pop(_KEY, None)
    OtherNames.take_off(module)


def held_positions(analysis: Analysis, model: nn.Module) -> list[Freeze]:
    """What the computed weights of a plain model cannot lose."""
    out: list[Freeze] = []
    for name, form in forms_in(model).items():
        first = analysis.trace.canonical(name)
        for held in form.held() if first in analysis.trace.parameters else ():
            axis_map = analysis.dims.roots.get((first, held.axis), {})
            text = f"{name} is computed by {form.title}: {held.text}"
            for dim, vector in axis_map.items():
                positions = analysis.dims.positions(dim, vector[held.mask & (vector >= 0)])
                if len(positions):
                    out.append((positions, Reason("parametrisation", text)))
    return out


# -- finding


def _may_compute(module: nn.Module) -> bool:
    if "parametrizations" in module._modules:
        return True
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(isinstance(hook, (OldWeightNorm, OldSpectralNorm)) for hook in hooks.values())


def _weights(path: str, module: nn.Module) -> Iterator[Reparametrised]:
    """The weights that a module computes; none where not all of them can be ordinary ones."""
    if isinstance(module, _PAST):
        return
    prefix = f"{path}." if path else ""
    for key, hook in module._forward_pre_hooks.items():
        form = _of_hook(module, hook)
        if form is not None:
            name: str = hook.name  # type: ignore[attr-defined]
            yield Reparametrised(prefix + name, name, module, form, key)
    if parametrize.is_parametrized(module):
        chains = dict(module.parametrizations.items())  # type: ignore[operator, union-attr]
        forms = {attribute: _of_chain(attribute, chain) for attribute, chain in chains.items()}
        if None not in forms.values():
            for attribute, form in forms.items():
                assert form is not None
                yield Reparametrised(prefix + attribute, attribute, module, form, None)


def _of_hook(module: nn.Module, hook: Any) -> Form | None:
    if type(hook) is OldWeightNorm:
        names = f"{hook.name}_v", f"{hook.name}_g"
        v, g = (getattr(module, name) for name in names)
        return WeightNorm(names, v, g, _axis(hook.dim, v))
    if type(hook) is OldSpectralNorm:
        o, *uv = (getattr(module, f"{hook.name}_{end}") for end in ("orig", "u", "v"))
        return SpectralNorm(tuple(f"{hook.name}_{end}" for end in ("orig", "u", "v")), o, tuple(uv), hook.dim % o.dim())
    return None


def _of_chain(attribute: str, chain: Any) -> Form | None:
    """The form of a list of parametrisations; None for one that computes something else each time."""
    prefix = f"parametrizations.{attribute}."
    only = chain[0] if len(chain) == 1 else None
    if type(only) is parametrizations._WeightNorm:
        g, v = chain.original0, chain.original1
        return WeightNorm((f"{prefix}original1", f"{prefix}original0"), v, g, _axis(only.dim, v))
    if type(only) is parametrizations._SpectralNorm:
        o = chain.original
        uv = (only._u, only._v) if o.dim() > 1 else ()
        names = (f"{prefix}original", f"{prefix}0._u", f"{prefix}0._v")[: 1 + len(uv)]
        return SpectralNorm(names, o, uv, only.dim)
    computed = Computed(chain, prefix)
    try:
        value = computed.value()
        return computed if value.is_floating_point() and computed.steady else None
    except Unclonable:
        raise
    except Exception:  # what fails here fails in the user's own run too, with his own line
        return None


def _axis(dim: int, v: Tensor) -> int:
    return dim if dim == -1 else dim % v.dim()


def _unshared(found: dict[str, tuple[Reparametrised, ...]]) -> dict[str, tuple[Reparametrised, ...]]:
    """Without the modules whose weights are computed from tensors that another weight is computed from too."""
    uses = Counter(id(t) for weights in found.values() for w in weights for t in w.form.sources().values())
    return {
        path: weights
        for path, weights in found.items()
        if all(uses[id(t)] == 1 for w in weights for t in w.form.sources().values())
    }


# -- taking off


def _make_plain(clone: nn.Module, weights: tuple[Reparametrised, ...]) -> None:
    if any(w.hook is None for w in weights):
        clone.__class__ = type(clone).__bases__[0]
        del clone._modules["parametrizations"]
    for weight in weights:
        sources = weight.form.sources()
        kept = any(isinstance(tensor, nn.Parameter) for tensor in sources.values())
        for name in sources:
            clone._parameters.pop(name, None)
            clone._buffers.pop(name, None)
        if weight.hook is not None:
            del clone._forward_pre_hooks[weight.hook]
            clone.__dict__.pop(weight.attribute, None)
        value = weight.form.value().detach()
        if kept:
            trained = any(t.requires_grad for t in sources.values())
            made = nn.Parameter(value, requires_grad=trained)
            clone._parameters = {weight.attribute: made, **clone._parameters}
        else:
            clone._buffers = {weight.attribute: value, **clone._buffers}
    clone.__dict__[_KEY] = _Memory(weights)


__all__ = ["Reparametrised", "forget", "forms_in", "held_positions", "plain", "reparametrised"]
