"""Copies of a model in which some tensors are others. Nothing is copied twice, nothing of the original is touched."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...errors import GraphPruneError
from ...tracing.names import all_modules, named_tensors


def clone_with(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
    caches: Iterable[tuple[str, str]] = (),
) -> nn.Module:
    """A deep copy of `model` with the named parameters and buffers replaced by `tensors`, and the modules at the paths
    in `modules` by those, wherever they are registered.

    `caches` (module path, attribute): dicts of tensors computed from parameters; they start empty in the copy.

    What is replaced is not copied first. Shared parameters stay shared, `requires_grad` and memory format stay, hooks
    and attributes are copied as `copy.deepcopy` does. A name that does not exist yet (a bias that folding adds) becomes
    a parameter of its module.
    """
    memo: dict[int, Any] = {}
    keep: list[Any] = []
    named = named_tensors(model)
    added: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = named.get(name)
        if old is None:
            added[name] = tensor
            continue
        memo[id(old)] = _like(old, tensor)
    if modules:
        by_path = all_modules(model)
        for path, module in modules.items():
            memo[id(by_path[path])] = module.train(by_path[path].training)
    for path, attribute in caches:
        cache = getattr(model.get_submodule(path), attribute, None)
        if type(cache) is dict:
            memo[id(cache)] = {}
    _memoise_results(model, memo, keep)
    _memoise_tensors(named, memo, frozenset(modules or ()))
    try:
        out = _copy_module(model, memo)
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


def _memoise_results(model: nn.Module, memo: dict[int, Any], keep: list[Any]) -> None:
    """deepcopy refuses tensors that are results of a computation (the old weight_norm keeps one); copy their values."""
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
                keep.append(value)


def _memoise_tensors(named: Mapping[str, Tensor], memo: dict[int, Any], gone: frozenset[str]) -> None:
    """Copy the ordinary parameters and buffers: those with a memory of their own and nothing else about them. The rest
    is left to the copy protocol, which is slow. Tensors of the modules `gone` go with them."""
    owners = Counter(t.untyped_storage()._cdata for t in {id(t): t for t in named.values()}.values())
    for name, tensor in named.items():
        if (
            id(tensor) not in memo
            and name.rpartition(".")[0] not in gone
            and type(tensor) in (Tensor, nn.Parameter)
            and not tensor.__dict__
            and tensor.is_leaf
            and tensor.grad is None
            and tensor.layout is torch.strided
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            and owners[tensor.untyped_storage()._cdata] == 1
        ):
            copied = tensor.detach().clone()
            if type(tensor) is nn.Parameter:
                copied = nn.Parameter(copied, tensor.requires_grad)
            memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)


# nn.Module's own tables: nearly always empty, and slow to copy one by one through the copy protocol
_TABLES = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict))
_COPY_PROTOCOL = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


# A convolution's __setstate__ only fills in what pickles of old versions lack.
_HARMLESS = frozenset((nn.Module.__setstate__, _ConvNd.__setstate__))


_known_kinds: weakref.WeakKeyDictionary[type[nn.Module], bool] = weakref.WeakKeyDictionary()


def _ordinary(kind: type[nn.Module]) -> bool:
    """The class copies as nn.Module does."""
    known = _known_kinds.get(kind)
    if known is None:
        others = (m for m in _COPY_PROTOCOL if m != "__setstate__")
        known = all(getattr(kind, m, None) is getattr(nn.Module, m, None) for m in others)
        known = _known_kinds[kind] = known and kind.__setstate__ in _HARMLESS
    return known


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copy.deepcopy does for a module, without its detours."""
    known = memo.get(id(module))
    if known is not None:
        return known  # type: ignore[no-any-return]
    kind = type(module)
    if not _ordinary(kind):
        return copy.deepcopy(module, memo)
    out: nn.Module = kind.__new__(kind)
    memo[id(module)] = out
    target = out.__dict__
    for name, value in module.__dict__.items():
        if name == "_compiled_call_impl":
            continue  # of module.compile(): it goes on running the module it was made for; torch's copies lack it
        elif name == "_modules":
            target[name] = type(value)((k, None if m is None else _copy_module(m, memo)) for k, m in value.items())
        elif name in _TABLES and not value:
            target[name] = type(value)()
        elif name in ("_parameters", "_buffers"):
            target[name] = type(value)((k, _copy_tensor(t, memo)) for k, t in value.items())
        elif type(value) is set and not value:
            target[name] = set()
        elif value is None or isinstance(value, (bool, int, float, str)) or (type(value) is tuple and _flat(value)):
            target[name] = value
        elif type(value) is list and _flat(value):
            target[name] = memo.setdefault(id(value), list(value))
        else:
            target[name] = copy.deepcopy(value, memo)
    return out


def _copy_tensor(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    known: Tensor | None = memo.get(id(tensor))
    return copy.deepcopy(tensor, memo) if known is None else known


def _flat(value: tuple[Any, ...] | list[Any]) -> bool:
    return all(type(item) in (int, float, str, bool, type(None)) for item in value)
