"""Which objects are alike to one who reads their constructors beside them: those of one class with the same plain
attributes, tensors of the same shapes, and parts that are alike."""

from __future__ import annotations

import hashlib
import itertools
import types
import weakref
from typing import Any

import torch
from torch import nn

from ..cloning import INTERNAL

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
# No two classes or functions get one number, also not where one takes the place of another in memory.
_serial: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next = itertools.count()


class Alikeness:
    """Keys that are equal for modules that are alike, as they are now."""

    def __init__(self) -> None:
        self._known: dict[int, str | None] = {}

    def key(self, module: nn.Module) -> str | None:
        """Of a module; None where it has attributes that may be anything."""
        if id(module) not in self._known:
            self._known[id(module)] = None  # what contains itself is like nothing
            self._known[id(module)] = self._key(module)
        return self._known[id(module)]

    def _key(self, module: nn.Module) -> str | None:
        said = [str(_number(type(module)))]
        for name, value in vars(module).items():
            if name not in INTERNAL:
                text = _text(value)
                if text is None:
                    return None
                said += (name, text)
        for table in (module._parameters, module._buffers):
            said.append("tensors")
            for name, tensor in table.items():
                said += (name, "" if tensor is None else str(tuple(tensor.shape)))
        for name, child in module._modules.items():
            key = "" if child is None else self.key(child)
            if key is None:
                return None
            said += (name, key)
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()


def _text(value: Any) -> str | None:
    """Equal for equal plain values, and lists of them; None for others."""
    if type(value) in _PLAIN:
        return repr(value)
    if type(value) in (list, tuple):
        parts = [_text(item) for item in value]
        return None if None in parts else f"{type(value).__name__}{parts}"
    return f"#{_number(value)}" if isinstance(value, _NAMED) else None


def _number(value: Any) -> int:
    found = _serial.get(value)
    if found is None:
        found = _serial.setdefault(value, next(_next))
    return found


__all__ = ["Alikeness"]
