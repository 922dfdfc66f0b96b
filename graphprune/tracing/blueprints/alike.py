"""Which objects are alike to one who reads their constructors beside them: those of one class with the same plain
attributes, tensors of the same shapes, and parts that are alike."""

from __future__ import annotations

import functools
import hashlib
import itertools
import types
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..cloning import INTERNAL

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
# No two classes or functions get one number, also not where one takes the place of another in memory.
_serial: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
# The numbers of what modules are made of. None is given twice, also not when the oldest are forgotten.
_known: dict[Hashable, int] = {}
_next = itertools.count()
# Of how many kinds of modules the number is remembered.
_MOST = 1 << 14
# Of longer lists a digest is kept, not what lies in them.
_LONG = 64


class Alikeness:
    """Keys that are equal for modules that are alike, as they are now."""

    def __init__(self) -> None:
        self._keys: dict[int, int | None] = {}

    def key(self, module: nn.Module) -> int | None:
        """Of a module; None where it has attributes that may be anything."""
        at = id(module)
        if at not in self._keys:
            self._keys[at] = None  # what contains itself is like nothing
            self._keys[at] = self._key(module)
        return self._keys[at]

    def _key(self, module: nn.Module) -> int | None:
        table = module.__dict__
        names = _own_names(tuple(table))
        values = [table[name] for name in names]
        plain = [value if type(value) in _PLAIN else _plain(value) for value in values]
        parts = [-1 if child is None else self.key(child) for child in module._modules.values()]
        kinds = tuple(map(type, values))  # True is 1
        unknown = (p is None and kind is not type(None) for p, kind in zip(plain, kinds, strict=True))
        if None in parts or (None in plain and any(unknown)):
            return None
        shapes = [
            (*held, *[None if tensor is None else tensor.shape for tensor in held.values()])
            for held in (module._parameters, module._buffers)
        ]
        own = _number(type(module)), names, kinds, tuple(plain)
        return _serial_of((own, *shapes, tuple(module._modules), tuple(parts)))


@functools.lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are no bookkeeping of torch's."""
    return tuple(name for name in names if name not in INTERNAL)


def _serial_of(said: Hashable) -> int:
    found = _known.get(said)
    if found is None:
        if len(_known) >= _MOST:
            _known.clear()
        found = _known.setdefault(said, next(_next))
    return found


def _plain(value: Any) -> Hashable:
    """Equal for equal plain values of one type, and lists of them; None for others."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is list or kind is tuple:
        parts = tuple(map(_plain, value))
        if None in parts:
            return None
        return kind, parts if len(parts) <= _LONG else hashlib.blake2b(repr(parts).encode()).digest()
    return ("named", _number(value)) if isinstance(value, _NAMED) else None


def _number(value: Any) -> int:
    found = _serial.get(value)
    if found is None:
        found = _serial.setdefault(value, next(_next))
    return found


__all__ = ["Alikeness"]
