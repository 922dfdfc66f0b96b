"""What a loss holds itself - class vectors, centres, averages, counters - as part of how far a training has come."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.reach import attributes, content_of, reachable
from ...support.walking import all_modules, tensors_in

_PREFIX = "loss/"
_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))  # flags and tables that every module has
_Table = MutableMapping[str, Any]


class LossState:
    """The tensors and plain values of a loss: of its modules, wherever it keeps them, of itself where it is an object,
    and of what its function has kept or names. Not those of `apart`: networks that are stored elsewhere, or stay."""

    def __init__(self, loss_fn: Any, apart: Iterable[nn.Module | None] = ()) -> None:
        others = [all_modules(model) for model in apart if model is not None]
        self._apart = {id(t) for modules in others for t in tensors_in(modules).values()}
        skipped = {id(module) for modules in others for module in modules.values()}
        self._tables = [] if loss_fn is None else list(_tables(loss_fn, skipped))
        self._start = self._plain()
        self._moved: set[str] = set()  # plain values that have changed, in this process or before

    def tensors(self) -> dict[str, Tensor]:
        """By name, each once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, value in self._values():
            if isinstance(value, Tensor) and id(value) not in self._apart:
                found.setdefault(id(value), (name, value))
        return dict(found.values())

    def changed(self) -> dict[str, Any]:
        """The plain values that are not what they were at first: those that count, not those that set something."""
        now = self._plain()
        self._moved |= {name for name, value in now.items() if not _same(self._start.get(name, self), value)}
        return {name: _written(now[name]) for name in self._moved & now.keys()}

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `changed` gave. Raises GraphPruneError, changing nothing, where it does not fit
        this loss."""
        plain = {name: _read(value) for name, value in plain.items()}
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
        own = self.tensors()
        for name in own.keys() - stored.keys():
            raise _other(name)
        for name, value in (*stored.items(), *plain.items()):
            if name not in own and not self._possible(name, value):
                raise _other(name)
            if isinstance(own.get(name), nn.Parameter) and not _fits(own[name], value):
                raise _other(name)
        for name, value in (*stored.items(), *plain.items()):
            self._put(name, own.get(name), value)
        self._moved |= plain.keys()

    def _values(self) -> Iterator[tuple[str, Any]]:
        for number, (kind, _, table) in enumerate(self._tables):
            for name in [name for name in table if name not in _OF_MODULES]:
                yield f"{_PREFIX}{number}.{kind}.{name}", table[name]

    def _plain(self) -> dict[str, Any]:
        return {name: value for name, value in self._values() if type(value) in _PLAIN}

    def _possible(self, name: str, value: Any) -> bool:
        """Whether a run of this loss may have made such a value there: no other attributes of a class are touched."""
        place = self._place(name)
        if place is None or not (isinstance(value, Tensor) or type(value) in _PLAIN):
            return False
        owner, table, key = place
        if key in table:
            return isinstance(table[key], (Tensor, *_PLAIN))
        return table is getattr(owner, "__dict__", None) and not hasattr(owner, key)

    def _place(self, name: str) -> tuple[Any, _Table, str] | None:
        number, kind, key = [*name.removeprefix(_PREFIX).split(".", 2), "", ""][:3]
        at = int(number) if number.isdecimal() else len(self._tables)
        if at >= len(self._tables) or self._tables[at][0] != kind or not key.isidentifier():
            return None
        return *self._tables[at][1:], key

    def _put(self, name: str, old: Tensor | None, value: Any) -> None:
        if old is not None and _fits(old, value):
            with torch.no_grad():
                old.copy_(value)
            return
        place = self._place(name)
        assert place is not None
        _, table, key = place
        table[key] = value.to(old.device) if old is not None else value


def _other(name: str) -> GraphPruneError:
    return GraphPruneError(f"it is of another loss: {name.removeprefix(_PREFIX)} does not fit; pass the same loss_fn")


def _written(value: Any) -> Any:
    """As JSON, which has no infinite numbers."""
    return [str(value)] if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    return float(value[0]) if isinstance(value, list) and value in (["inf"], ["-inf"], ["nan"]) else value


def _same(before: Any, now: Any) -> bool:
    return type(before) is type(now) and before == now


def _fits(own: Tensor, stored: Tensor) -> bool:
    return own.shape == stored.shape and own.dtype == stored.dtype


def _tables(loss_fn: Any, skipped: set[int]) -> Iterator[tuple[str, Any, _Table]]:
    """Names and values that may change while the loss is used, with the kind of what they are of, and that itself."""
    root = _holder(loss_fn)
    roots = [root]
    if isinstance(root, types.FunctionType):
        known = {n: root.__globals__[n] for n in root.__code__.co_names if n in root.__globals__}
        kept = {n: v for n, v in known.items() if isinstance(v, (Tensor, nn.Module))}
        yield "function", root, _Names(root, set(kept))
        roots += [v for v in kept.values() if isinstance(v, nn.Module)]
    elif not isinstance(root, nn.Module) and (own := attributes(root)) is not None:
        yield type(root).__name__, root, own
    seen = set(skipped)
    for value in (found for start in roots for found in reachable(start, closures=True)):
        if isinstance(value, nn.Module) and id(value) not in seen:
            seen.add(id(value))
            kind = type(value).__name__
            yield kind, value, value._parameters
            yield kind, value, value._buffers
            yield kind, value, vars(value)


def _holder(loss_fn: Any) -> Any:
    """The object or function behind methods and `functools.partial`."""
    while isinstance(loss_fn, (functools.partial, types.MethodType)):
        loss_fn = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn.__self__
    return loss_fn


class _Names(MutableMapping[str, Any]):
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
