"""The modules and tensors of a model by name, from one walk.

`named_modules` and `named_parameters` walk the tree anew every time, recursively; on small networks that takes longer
than what it is done for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn


class _Walk:
    """A model, and what was found in it once somebody asked."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] | None = None
        self.first: dict[str, nn.Module] | None = None
        self.tensors: dict[str, Tensor] | None = None


_Walks = dict[int, _Walk]


class _Memory(threading.local):
    """`walks`: of models by identity."""

    walks: _Walks = {}


_memory = _Memory()


def walked_once(models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """While inside, on this thread, `all_modules` of these models is what the first walk found: for functions that
    leave the modules of these models where they are."""
    known = _memory.walks
    new: _Walks = {id(model): _Walk(model) for model in models if id(model) not in known}
    return _knowing({**known, **new} if new else known)


def walked_anew() -> AbstractContextManager[None]:
    """While inside, on this thread, nothing is taken from an earlier walk: for functions that change models."""
    return _knowing({})


@contextlib.contextmanager
def _knowing(walks: _Walks) -> Iterator[None]:
    outside = _memory.walks
    try:
        _memory.walks = walks
        yield
    finally:
        _memory.walks = outside


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, also under the second path of a shared one, in the order of `named_modules`. Not to be
    changed: others may get the same dict."""
    walk = _memory.walks.get(id(model))
    if walk is None:
        return _walked(model)
    if walk.modules is None:
        walk.modules = _walked(model)
    return walk.modules


def _walked(model: nn.Module) -> dict[str, nn.Module]:
    out: dict[str, nn.Module] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None:
                out[prefix + name] = child
                if child._modules:
                    walk(f"{prefix}{name}.", child)

    out[""] = model
    walk("", model)
    return out


def first_names(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module once, under the first of its paths. Not to be changed, as `all_modules`."""
    walk = next((walk for walk in _memory.walks.values() if walk.modules is modules), None)
    if walk is None:
        return _first_names(modules)
    if walk.first is None:
        walk.first = _first_names(modules)
    return walk.first


def _first_names(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    seen: set[int] = set()
    out = {}
    for path, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            out[path] = module
    return out


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, then all buffers, by name; shared ones under each of their names. Not to be changed."""
    walk = _memory.walks.get(id(model))
    if walk is None:
        return tensors_in(_walked(model))
    if walk.tensors is None:
        walk.tensors = tensors_in(all_modules(model))
    return walk.tensors


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """One of `named_tensors`, without a walk. Raises KeyError where there is none."""
    path, _, last = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = module._modules[part] if module is not None else None
    for table in () if module is None else (module._parameters, module._buffers):
        found = table.get(last)
        if found is not None:
            return found
    raise KeyError(name)


def tensors_in(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What these modules, by path, hold themselves: all parameters, then all buffers, by name."""
    out: dict[str, Tensor] = {}
    for table in ("_parameters", "_buffers"):
        for path, module in modules.items():
            held = module.__dict__[table]
            if held:
                prefix = path + "." if path else ""
                for name, tensor in held.items():
                    if tensor is not None:
                        out[prefix + name] = tensor
    return out
