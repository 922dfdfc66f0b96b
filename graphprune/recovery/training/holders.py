"""Where a loss may hold what changes while it is used: attributes, buffers, slots, and names of functions."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from ...support.reach import attributes, content_of, reachable, slots

# Of objects that a function names, what is no object of the user's.
_NO_HOLDERS = (type, types.ModuleType, types.BuiltinFunctionType)


@dataclasses.dataclass(frozen=True)
class Table:
    """Names and values. `owner`: what has them, `kind`: what that is called; `whole`: whether all tensors in it belong
    to the loss, or only those that change."""

    kind: str
    owner: Any
    values: MutableMapping[str, Any]
    whole: bool = True


def tables(loss_fn: Any, skipped: set[int]) -> Iterator[Table]:
    """All that a loss leads to, without these modules (by id)."""
    root = _holder(loss_fn)
    roots: list[Any] = [root]
    if isinstance(root, types.FunctionType):
        for function, names in _functions(root):
            yield Table("function", function, names)
            roots += names.values()
    elif not isinstance(root, nn.Module):
        yield from _of_object(root, whole=True)
    seen = {*skipped, id(root)} if not isinstance(root, nn.Module) else set(skipped)
    for value in (found for start in roots for found in reachable(start, closures=True)):
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            kind = type(value).__name__
            yield Table(kind, value, value._parameters)
            yield Table(kind, value, value._buffers)
            yield Table(kind, value, vars(value))
        elif not isinstance(value, (Tensor, dict, list, tuple, types.FunctionType, types.MethodType)):
            yield from _of_object(value, whole=False)


def _of_object(value: Any, whole: bool) -> Iterator[Table]:
    kind = type(value).__name__
    if (own := attributes(value)) is not None:
        yield Table(kind, value, own, whole)
    if names := slots(value):
        yield Table(kind, value, Slots(value, names), whole)


def _holder(loss_fn: Any) -> Any:
    """The object or function behind methods and `functools.partial`."""
    while isinstance(loss_fn, (functools.partial, types.MethodType)):
        loss_fn = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn.__self__
    return loss_fn


def _functions(root: types.FunctionType) -> Iterator[tuple[types.FunctionType, Names]]:
    """A function and those of the same file that it names, with what they name beside functions."""
    waiting, seen = [root], {id(root)}
    while waiting:
        function = waiting.pop(0)
        known = {n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__}
        yield function, Names(function, {n for n, v in known.items() if not _is_code(v)})
        kept = map(content_of, function.__closure__ or ())
        for other in (v for v in (*known.values(), *kept) if isinstance(v, types.FunctionType)):
            if id(other) not in seen and other.__globals__ is root.__globals__:
                seen.add(id(other))
                waiting.append(other)


def _is_code(value: Any) -> bool:
    return isinstance(value, (*_NO_HOLDERS, types.FunctionType))


class Slots(MutableMapping[str, Any]):
    """The slots of an object that hold something."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self._owner, self._names = owner, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names or not hasattr(self._owner, name):
            raise KeyError(name)
        return getattr(self._owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)  # frozen dataclasses too

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names if hasattr(self._owner, name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Names(MutableMapping[str, Any]):
    """What a function finds under the names that it has kept of where it was made, and under these global ones."""

    def __init__(self, function: types.FunctionType, names: set[str]) -> None:
        cells = function.__closure__ or ()
        self._cells = dict(zip(function.__code__.co_freevars, cells, strict=True))
        self._globals, self._names = function.__globals__, sorted(names - self._cells.keys())

    def __getitem__(self, name: str) -> Any:
        return content_of(self._cells[name]) if name in self._cells else self._globals[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            self._globals[name] = value

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._cells, *self._names])

    def __len__(self) -> int:
        return len(self._cells) + len(self._names)


__all__ = ["Names", "Slots", "Table", "tables"]
