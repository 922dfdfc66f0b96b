"""Copies of a model in which some tensors are others. Nothing is copied twice, nothing of the original is touched."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...errors import GraphPruneError
from ...support.reach import reachable
from ...support.walking import all_modules, named_tensors
from .rebinding import rebind


def clone_with(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
    caches: Iterable[tuple[str, str]] = (),
) -> nn.Module:
    """A deep copy of `model` with the named parameters and buffers replaced by `tensors`, and the modules at the paths
    in `modules` by those, wherever they are registered.

    `caches` (module path, attribute): dicts of tensors computed from parameters; the copy's hold none of these tensors.

    What is replaced is not copied first. Shared parameters stay shared, `requires_grad` and memory format stay, hooks
    and attributes are copied as `copy.deepcopy` does. Results of a computation (a feature that the last step of
    training left in a list) are copied without their history, wherever they lie. A name that does not exist yet (a
    bias that folding adds) becomes a parameter of its module.

    Raises GraphPruneError, naming the attribute, where something that the model holds cannot be copied.
    """
    memo: dict[int, Any] = {}
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
    # a buffer that the forward replaces is in a table of nn.Module's, which is no cache
    kept = [getattr(model.get_submodule(path), name, None) for path, name in caches if name not in _TABLES]
    memo.update((id(cache), {}) for cache in kept if type(cache) is dict)
    _memoise_tensors(named, memo, frozenset(modules or ()))
    known = dict(memo)
    copier = _Copier(model, memo)
    try:
        out = copier.module(model)
        copier.attributes({id(t): t for t in named.values()}.values())
        for cache in (c for c in kept if type(c) is dict):
            others = {key: value for key, value in cache.items() if not isinstance(value, Tensor)}
            memo[id(cache)].update(copier.anything(others))
    except Exception as error:
        raise _uncopyable(model, known, error) from error
    if copier.met_others:  # functions among them
        rebind(((m, memo[id(m)]) for m in all_modules(model).values() if id(m) in memo), memo)
    paths = all_modules(out) if added else {}
    for name, tensor in added.items():
        path, _, attribute = name.rpartition(".")
        module = paths[path]
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
    if type(old) is nn.Parameter or isinstance(old, nn.Parameter):
        made: Tensor = nn.Parameter(new, requires_grad=old.requires_grad)
    elif isinstance(old, nn.Buffer):
        made = nn.Buffer(new, persistent=old.persistent)
    else:
        made = new.requires_grad_(old.requires_grad) if old.requires_grad else new
    return made


def _memoise_results(model: nn.Module, memo: dict[int, Any]) -> None:
    """deepcopy refuses tensors that are results of a computation (the old weight_norm keeps one); copy their values."""
    results = [t for t in reachable(model) if isinstance(t, Tensor) and not t.is_leaf and id(t) not in memo]
    memo.update((id(tensor), tensor.detach().clone()) for tensor in results)
    memo[id(memo)] = results  # deepcopy's own place for what must outlive the copy


def _uncopyable(model: nn.Module, known: dict[int, Any], error: Exception) -> GraphPruneError:
    """The error that names what cannot be copied, found by copying every attribute alone."""
    modules = all_modules(model)
    known = {**known, **{id(m): m for m in modules.values()}}
    _memoise_results(model, known)
    where = ""
    for name, value in ((f"{path}.{n}".lstrip("."), v) for path, m in modules.items() for n, v in _attributes(m)):
        if not where and not _copyable(value, known):
            culprit = [v for v in reachable(value) if not _copyable(v, known)][-1:] or [value]
            inside = "" if culprit[0] is value else f" in a {type(value).__name__}"
            where = f": {name} holds a {type(culprit[0]).__name__}{inside}"
    return GraphPruneError(
        f"the model cannot be copied with copy.deepcopy ({type(error).__name__}: {error}){where}; make its attributes "
        f"copyable (no open files, locks or generators), or take them off before pruning"
    )


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers"):
            yield from value.items()
            held = ((key, tensor) for key, tensor in value.items() if tensor is not None)
            yield from ((f"{key}.{n}", v) for key, tensor in held for n, v in tensor.__dict__.items())
        elif name != "_modules":
            yield name, value


def _copyable(value: Any, known: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(known))
    except Exception:
        return False
    return True


def _memoise_tensors(named: Mapping[str, Tensor], memo: dict[int, Any], gone: frozenset[str]) -> None:
    """Copy the ordinary parameters and buffers: those with a memory of their own and no gradient. The rest
    is left to the copy protocol, which is slow. Tensors of the modules `gone` go with them."""
    ordinary = {n: t for n, t in named.items() if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided}
    owners = Counter(t.untyped_storage()._cdata for t in {id(t): t for t in ordinary.values()}.values())
    for name, tensor in ordinary.items():
        if (
            id(tensor) not in memo
            and name.rpartition(".")[0] not in gone
            and tensor.is_leaf
            and tensor.grad is None
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
        # torch._dynamo puts another __setstate__ in the place of nn.Module's, for all modules
        harmless = kind.__setstate__ in _HARMLESS or kind.__setstate__ is nn.Module.__setstate__
        known = _known_kinds[kind] = known and harmless
    return known


# Of module.compile(): it goes on running the module it was made for; torch's copies lack it.
_COMPILED = "_compiled_call_impl"


class _Copier:
    """What copy.deepcopy does, without its detours where a model is made of modules, tensors, numbers and names.
    `met_others`: it is made of something else too."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self.model, self.memo, self.met_others = model, memo, False

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a module and of all it holds."""
        known = self.memo.get(id(module))
        if known is not None:
            return known  # type: ignore[no-any-return]
        kind = type(module)
        if not _ordinary(kind):
            copied: nn.Module = self.anything(module)
            return copied
        out: nn.Module = kind.__new__(kind)
        self.memo[id(module)] = out
        target = out.__dict__
        for name, value in module.__dict__.items():
            if value is None or type(value) in _FLAT:
                target[name] = value
            elif name in _TABLES:
                target[name] = self._table(name, value) if value else type(value)()
            elif name != _COMPILED:
                target[name] = self._value(value)
        target.pop(_COMPILED, None)
        return out

    def _table(self, name: str, table: dict[str, Any]) -> dict[str, Any]:
        """One of nn.Module's own dicts."""
        if name == "_modules":
            return type(table)((key, None if m is None else self.module(m)) for key, m in table.items())
        if name in ("_parameters", "_buffers"):
            return type(table)((key, self.tensor(t)) for key, t in table.items())
        copied: dict[str, Any] = self.anything(table)
        return copied

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind is set and not value:
            return set()
        if isinstance(value, (bool, int, float, str, type, torch.dtype)) or (kind is tuple and _flat(value)):
            return value
        if kind is list and _flat(value):
            return self.memo.setdefault(id(value), list(value))
        return self.anything(value)

    def tensor(self, tensor: Tensor | None) -> Tensor | None:
        """A copy of a parameter or buffer."""
        if tensor is None:
            return None
        known: Tensor | None = self.memo.get(id(tensor))
        return self.anything(tensor) if known is None else known

    def attributes(self, tensors: Iterable[Tensor]) -> None:
        """What the user has set on parameters (`weight.no_decay = True`); torch's own copies of them lose it."""
        for old in tensors:
            new = self.memo.get(id(old)) if old.__dict__ else None
            for key, value in old.__dict__.items() if isinstance(new, Tensor) else ():
                if key != "_graphprune_node" and key not in new.__dict__:
                    setattr(new, key, self.anything(value))

    def anything(self, value: Any) -> Any:
        """By the copy protocol."""
        if not self.met_others:
            self.met_others = True
            _memoise_results(self.model, self.memo)
        return copy.deepcopy(value, self.memo)


_FLAT = frozenset((int, float, str, bool, type(None)))


def _flat(value: tuple[Any, ...] | list[Any]) -> bool:
    return _FLAT.issuperset(map(type, value))
