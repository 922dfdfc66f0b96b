"""What a model holds: everything that its attributes lead to."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

_PLAIN = frozenset((list, tuple, set, frozenset, dict))
_TABLES = _PLAIN | {collections.OrderedDict}
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, range, slice))
_CLOSED = (type, types.ModuleType, types.BuiltinFunctionType)
# Of the standard library's objects only those that are there to hold others: a logger leads to the whole process.
_OPEN = frozenset(("collections", "types", "functools"))


def reachable(root: Any, closures: bool = False) -> list[Any]:
    """All that `root` leads to, each object once, itself included: through attributes, slots, items of containers,
    bound methods, attributes and gradients of tensors, and with `closures` what functions (hooks) have kept of where
    they were made. Not through classes, Python modules and global names."""
    closed = _CLOSED if closures else (*_CLOSED, types.FunctionType)
    found: dict[int, Any] = {id(root): root}
    waiting = [root]
    while waiting:
        for value in _held(waiting.pop()):
            kind = type(value)
            if kind in _ATOMS or id(value) in found:
                continue
            if kind in _TABLES:
                found[id(value)] = value
                if value or (kind is collections.OrderedDict and vars(value)):  # modules have ten empty tables each
                    waiting.append(value)
            elif not isinstance(value, closed):
                found[id(value)] = value
                waiting.append(value)
    return list(found.values())


def attributes(value: Any) -> dict[str, Any] | None:
    """The table of a value's attributes, or None where it has none that can be changed."""
    if not _form(type(value)).open:
        return None
    table = getattr(value, "__dict__", None)
    return table if type(table) is dict else None


def same_objects(now: list[Any], before: list[Any]) -> bool:
    """The same objects in the same order."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def content_of(cell: types.CellType) -> Any:
    """What a function has kept under a name of where it was made; None where the name is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def slots(value: Any) -> tuple[str, ...]:
    """The names of a value's slots."""
    return _form(type(value)).slots


@dataclasses.dataclass(frozen=True)
class _Form:
    """What there is to look at in the objects of a class: attributes, and slots, whose names these are."""

    open: bool
    slots: tuple[str, ...]
    foreign: bool  # of the standard library


def _look(kind: type) -> _Form:
    home = kind.__module__.partition(".")[0]
    closed = home in sys.stdlib_module_names and home not in _OPEN and home != "builtins"
    # torch's operators and libraries keep what they have worked out in themselves, and rely on it
    engine = home in ("torch", "triton", "numpy") and not issubclass(kind, (Tensor, nn.Module))
    names: list[str] = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            hidden = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if hidden else name)
    kept = tuple(name for name in names if name not in ("__dict__", "__weakref__") and not engine)
    return _Form(not (closed or engine), kept, kind.__module__ in sys.stdlib_module_names)


# bounded: it keeps classes alive, which code may make by the dozen
_form: Callable[[type], _Form] = functools.lru_cache(maxsize=4096)(_look)


def _held(value: Any) -> Iterable[Any]:
    kind = type(value)
    if kind in _PLAIN:
        return [*value.keys(), *value.values()] if kind is dict else value
    table = attributes(value)
    held: list[Any] = list(table.values()) if table else []
    if isinstance(value, Tensor):
        if value.is_leaf and value.grad is not None:
            held.append(value.grad)
        return held
    if isinstance(value, dict):
        held += [*dict.keys(value), *dict.values(value)]
    elif isinstance(value, _CONTAINERS):
        held += value
    elif isinstance(value, types.MethodType):
        held.append(value.__self__)
    elif isinstance(value, types.FunctionType):
        held += map(content_of, value.__closure__ or ())
    elif isinstance(value, functools.partial):
        held += [value.func, value.args, value.keywords]
    elif table is not None or not _form(kind).foreign:
        held += [getattr(value, name) for name in slots(value) if hasattr(value, name)]
    return held
