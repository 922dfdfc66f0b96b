"""Shallow clones: modules of their own over the same values, so that a run changes nothing of the user's.

Every module of the model is made anew, with tables, containers and settings objects of its own; what lies in them is
shared, but for modules, which are the clone's, and tensors, which are what `tensor` makes of them. Bound methods and
partial functions are bound anew. What cannot be taken apart and holds a module of the model - a closure, an object of
compiled code - cannot be cloned: it would run the user's own module.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..support.reach import content_of, slots
from ..support.settings import NOT_THE_USERS, is_named_tuple, is_plain_object
from .origin import plain

Convert = Callable[[Tensor], Tensor]


class Unclonable(Exception):
    """What cannot be cloned, and where."""


# nn.Module's own bookkeeping, which is not a size of anything
_TABLES = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict))
INTERNAL = _TABLES | frozenset("training _non_persistent_buffers_set _is_full_backward_hook _version".split())
ATOMS = frozenset(
    (
        int, float, bool, str, type(None), bytes, complex, type, torch.dtype, torch.device, torch.Size, range, slice,
        torch.layout, torch.memory_format, types.BuiltinFunctionType, types.ModuleType, types.EllipsisType,
    )
)  # fmt: skip
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict)
# How far into the user's objects modules are looked for.
_DEPTH, _MOST = 8, 4000


PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Bare:
    """Makes tensors on the meta device, which have a shape and no values; for one tensor always the same one."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}
        self.keep: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        found = self.known.get(id(tensor))
        if found is None:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self.known[id(tensor)] = found = _like(tensor, found)
            self.keep.append(tensor)
        return found


# Larger buffers are not copied, in bytes.
_LARGE = 2**26


class SameMemory:
    """Makes other tensors of the same values, so that `tensor.data = ...` on one leaves the other alone. Buffers with a
    memory of their own get another one, as forward passes write into them. What is no ordinary tensor stays itself."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        distinct = {id(t): t for t in tensors if type(t) in PLAIN and t.layout is torch.strided}.values()
        self.owners = collections.Counter(t.untyped_storage()._cdata for t in distinct)

    def __call__(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in PLAIN:
            return tensor
        new = tensor.detach()
        if not _is_parameter(tensor) and tensor.layout is torch.strided and new.nbytes <= _LARGE:
            if self.owners[tensor.untyped_storage()._cdata] == 1:
                new = new.clone()
        return _like(tensor, new)


def _is_parameter(tensor: Tensor) -> bool:
    """As isinstance, which asks for an attribute of every tensor that is none."""
    kind = type(tensor)
    return kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter))


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """`new` as the kind of object that `tensor` is."""
    if _is_parameter(tensor):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    if tensor.__dict__:
        new.__dict__.update(tensor.__dict__)
    return new


@dataclasses.dataclass(frozen=True)
class Clones:
    """`modules`: clones under the paths of the user's. `shared`: what these hold too, as it was not copied: objects in
    lists, functions with what they have kept of where they were made."""

    modules: dict[str, nn.Module]
    shared: tuple[Any, ...]


def clone_modules(modules: Mapping[str, nn.Module], tensor: Convert) -> Clones:
    """The modules of a model (path -> module, "" the model itself) as clones.

    `tensor` makes the clone's tensor of each parameter and buffer; plain tensors that also lie elsewhere follow them.

    Raises Unclonable where something would still reach the model's own modules.
    """
    cloner = _Cloner(modules, tensor)
    for path, module in modules.items():
        cloner.path = path
        cloner.module(module)
    cloner.check_shared()
    shared = tuple({id(value): value for _, value in cloner.shared}.values())
    return Clones({path: cloner.made[id(module)] for path, module in modules.items()}, shared)


class _Cloner:
    """One act of cloning. `made`: id of what was met -> what stands for it."""

    def __init__(self, modules: Mapping[str, nn.Module], tensor: Convert) -> None:
        self.own = {id(module) for module in modules.values()}
        self.made: dict[int, Any] = {}
        self.keep: list[Any] = []  # a number in `made` must not become that of another object
        self.harmless: set[int] = set()
        self.shared: list[tuple[str, Any]] = []
        self.copied: set[int] = set()
        self.path = ""
        for module in modules.values():
            self.tensors(module, tensor)

    def tensors(self, module: nn.Module, tensor: Convert) -> None:
        for table in (module._parameters, module._buffers):
            for value in table.values():
                if value is not None and id(value) not in self.made:
                    self.made[id(value)] = tensor(value)
                    self.own.add(id(value))

    def note(self, value: Any, new: Any) -> Any:
        self.made[id(value)] = new
        self.keep.append(value)
        self.copied.add(id(value))
        return new

    # -- modules

    def module(self, module: nn.Module) -> nn.Module:
        found: nn.Module | None = self.made.get(id(module))
        if found is not None:
            return found
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise Unclonable(f"{self.path or 'the model'} is TorchScript")
        if hasattr(kind, "__del__"):
            raise Unclonable(f"{self.path or 'the model'} does something when it is gone")
        self.own.add(id(module))
        new: nn.Module = object.__new__(kind)
        self.made[id(module)] = new
        target = new.__dict__
        target.update(module.__dict__)
        for name, value in module.__dict__.items():
            held = type(value)
            if held in ATOMS:
                continue
            if name in _TABLES:
                target[name] = self.table(value) if value else held()
            elif name == "_compiled_call_impl":  # the class's own, uncompiled
                target[name] = None
            elif name == "_non_persistent_buffers_set":  # names; each module has its own
                target[name] = set(value)
            elif held is tuple and ATOMS.issuperset(map(type, value)):
                continue
            else:
                target[name] = self.value(value, settings=name not in INTERNAL)
        return new

    def table(self, table: dict[Any, Any]) -> dict[Any, Any]:
        """One of nn.Module's dicts, each of which belongs to its module alone."""
        new = type(table)()
        for key, value in table.items():
            new[key] = self.value(value)
        return new

    # -- what modules hold

    def value(self, value: Any, settings: bool = False) -> Any:
        """What stands for `value` in the clone. `settings`: a module's attribute, where plain objects are copied."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if isinstance(value, (int, float)):  # a number with an origin, where another thread records the same model
            return plain(value)
        found = self.made.get(id(value))
        if found is not None:
            return found
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return value
        if kind in _SEQUENCES or kind in _MAPPINGS or is_named_tuple(value):
            return self.container(value)
        if kind is types.MethodType:
            owner = self.value(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is functools.partial:
            return self.partial(value)
        if kind is weakref.ReferenceType:
            target = value()
            new = self.made.get(id(target), target)
            return value if new is target else weakref.ref(new)
        if is_plain_object(value) and ((settings and not callable(value)) or self.reaches(value, self.own)):
            return self.plain(value)
        if self.reaches(value, self.own):
            raise Unclonable(f"{self.path or 'the model'} holds a {kind.__name__} that holds a module of the model")
        if kind is not types.FunctionType or value.__closure__:
            self.shared.append((self.path, value))
        return value

    def check_shared(self) -> None:
        """Raise Unclonable where what could not be copied leads to something that was: it would be two things."""
        self.harmless.clear()
        for path, value in self.shared:
            if self.reaches(value, self.copied):
                raise Unclonable(f"{path or 'the model'} holds a {type(value).__name__} that shares what others hold")

    def container(self, value: Any) -> Any:
        """A container of the same kind; a mutable one stays one where it is held twice."""
        kind = type(value)
        if kind in _MAPPINGS:
            new: Any = self.note(value, copy.copy(value))
            if any(isinstance(key, nn.Module) for key in value):
                new.clear()
                new.update((self.value(key), self.value(item)) for key, item in value.items())
                return new
            for key, item in value.items():
                if type(item) not in ATOMS:
                    new[key] = self.value(item)
            return new
        if all(type(item) in ATOMS for item in value):
            return value if isinstance(value, (tuple, frozenset)) else self.note(value, copy.copy(value))
        if kind is list or kind is collections.deque:
            new = self.note(value, copy.copy(value))
            for place, item in enumerate(value):
                new[place] = self.value(item)
            return new
        items = [self.value(item) for item in value]
        if kind is set:
            return self.note(value, set(items))
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return kind(*items) if is_named_tuple(value) else kind(items)

    def partial(self, value: Any) -> Any:
        args, keywords = self.value(value.args), self.value(dict(value.keywords))
        new = functools.partial(self.value(value.func), *args, **keywords)
        new.__dict__.update(self.value(dict(value.__dict__)))
        return new

    def plain(self, value: Any) -> Any:
        """A copy of an object of the user's; where its class is more than attributes, as the copy protocol makes it."""
        kind: Any = type(value)
        simple = all(k is object or "__slots__" not in vars(k) for k in kind.__mro__) and kind.__new__ is object.__new__
        try:
            new = object.__new__(kind) if simple else copy.copy(value)
        except Exception:
            new = value
        if new is value:  # there is one of its class, or no copy can be made
            raise Unclonable(f"{self.path or 'the model'} holds a {kind.__name__} that cannot be copied")
        self.note(value, new)
        for key, item in value.__dict__.items():
            new.__dict__[key] = item if type(item) in ATOMS else self.value(item)
        if isinstance(value, dict):
            for key, item in list(dict.items(value)):
                if type(item) not in ATOMS:
                    dict.__setitem__(new, key, self.value(item))
        elif isinstance(value, list):
            for place, item in enumerate(list.__iter__(value)):
                if type(item) not in ATOMS:
                    list.__setitem__(new, place, self.value(item))
        elif not simple and self.reaches([_slot_values(value), *_items(value)], self.own):
            raise Unclonable(f"{self.path or 'the model'} holds a {kind.__name__} that holds a module of the model")
        return new

    # -- what cannot be taken apart

    def reaches(self, value: Any, wanted: set[int]) -> bool:
        """Whether `value` leads to one of these objects (by identity), as far as can be seen."""
        seen: set[int] = set()
        todo = [(value, 0)]
        while todo and len(seen) < _MOST:
            item, depth = todo.pop()
            if type(item) in ATOMS or id(item) in seen or id(item) in self.harmless:
                continue
            if id(item) in wanted:
                return True
            seen.add(id(item))
            if depth < _DEPTH and not isinstance(item, (nn.Module, Tensor)):
                todo.extend((held, depth + 1) for held in _held(item))
        if not todo:
            self.harmless |= seen
        return False


def _slot_values(value: Any) -> list[Any]:
    return [getattr(value, name, None) for name in slots(value)]


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, _SEQUENCES) else []


def _held(value: Any) -> list[Any]:
    """What a value of the user's refers to, one step on."""
    kind = type(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, _SEQUENCES):
        return list(value)
    if kind is types.MethodType:
        return [value.__self__, value.__func__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.FunctionType:
        return _held_by_function(value)
    if kind is weakref.ReferenceType:
        return [value()]
    if kind.__module__.startswith(NOT_THE_USERS):
        return []
    return [*getattr(value, "__dict__", {}).values(), *_slot_values(value)]


def _held_by_function(function: types.FunctionType) -> list[Any]:
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += function.__dict__.values()
    held += map(content_of, function.__closure__ or ())
    known = function.__globals__
    held += [known[n] for n in function.__code__.co_names if isinstance(known.get(n), (nn.Module, Tensor))]
    return held
