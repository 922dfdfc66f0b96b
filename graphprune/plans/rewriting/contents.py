"""What modules hold while a forward runs: a graph that stands for the forward changes none of it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...support.reach import attributes, same_objects

_CONTAINERS = (list, tuple, dict, set, deque)
_ATOMS = frozenset((type(None), bool, int, float, str))
_OTHERS = (int, float, str, Tensor, nn.Module, type, FunctionType)  # numbers that know where they come from, too
# `forward` and the sizes are ours during a recording; tables are looked at item by item.
_BOOKKEEPING = frozenset(("forward", "training"))
_TABLES = ("_parameters", "_buffers", "_modules")


class Contents:
    """The attributes, parameters, buffers, children and containers of a module and of those inside it, by identity.

    `note` takes them down as they are now, `difference` says what is another object since.
    """

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(m): path for path, m in module.named_modules()}
        self._held: dict[int, dict[str, Any]] = {}
        self._items: dict[int, tuple[Any, list[Any]]] = {}
        self._random = _random_state()
        self.note(module)

    def note(self, module: nn.Module) -> None:
        """From here on, what `module` and the modules inside it hold now is as it should be."""
        self._random = _random_state()
        for inner in module.modules():
            self._held[id(inner)] = held = _held(inner)
            self._items.update((id(c), (c, _items(c))) for c in _containers(held.values()))

    def difference(self, module: nn.Module) -> str:
        """The first thing in `module`, or in a module inside it, that is not as it was noted: "path.name", or ""."""
        for inner in module.modules():
            before, now = self._held.get(id(inner)), _held(inner)
            if before is None:
                return self._name(module, "module")
            for name in [*before, *(n for n in now if n not in before)]:
                if before.get(name, self) is not now.get(name, self) or self._refilled(now[name]):
                    return self._name(inner, name)
        return ""

    def drew_numbers(self) -> bool:
        """Random numbers of Python's or NumPy's were drawn since."""
        return self._random != _random_state()

    def _name(self, module: nn.Module, name: str) -> str:
        path = self._paths.get(id(module), type(module).__name__)
        return f"{path}.{name}" if path else name

    def _refilled(self, value: Any) -> bool:
        for container in _containers((value,)):
            before = self._items.get(id(container))
            if before is not None and not same_objects(_items(container), before[1]):
                return True
        return False


def _held(module: nn.Module) -> dict[str, Any]:
    held = {name: value for name, value in module.__dict__.items() if name not in _BOOKKEEPING}
    for table in _TABLES:
        held.update(held.pop(table, ()))
    return held


def _containers(values: Iterable[Any]) -> list[Any]:
    """The containers, and tables of plain objects' attributes, among the values and inside them, each once."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in _ATOMS or isinstance(value, _OTHERS):
            continue
        table = value if isinstance(value, _CONTAINERS) else attributes(value)
        if table is not None and id(table) not in found:
            found[id(table)] = table
            waiting += _items(table)
    return list(found.values())


def _items(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _random_state() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:]
