"""Leave a model as it was: whatever its own code, or a library that runs it, has changed in what it holds."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .interrupts import shielded
from .reach import attributes, reachable, same_objects, slots

_TABLES, _SERIES = frozenset((dict, OrderedDict)), frozenset((list, set, deque))


@contextlib.contextmanager
def restored(model: Any, closures: bool = False) -> Iterator[None]:
    """Whatever `model`, or anything else, holds is afterwards as before, also after an error: attributes, tables of
    parameters, buffers, modules and hooks; lists, dicts, sets and deques at any depth, which stay the same objects,
    shared or not; attributes and slots of plain objects; `requires_grad` and gradients; with `closures`, what hooks
    have kept of where they were made.

    Tensors get the memory back that they had (`.data = ...`). What is in it is copied before, and put back where it
    differs, but for parameters, which are taken to keep their values: a copy could be too large.
    """
    with shielded() as shield:
        undo = [step for value in reachable(model, closures) for step in _steps(value)]
        try:
            with shield.lifted():
                yield
        finally:
            for step in undo:
                step()


def kept_attributes(modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """What puts back the attributes of modules, their tables and the lists, dicts and sets among them: `restored` for
    every run of a model, without what lies deeper and without values of tensors."""
    empty: list[dict[Any, Any]] = []  # modules have ten empty tables each
    undo = [lambda: _emptied(empty)]
    for module in modules:
        held = module.__dict__
        undo.append(_table(held))
        for value in held.values():
            kind = type(value)
            if kind in _TABLES:
                if value:
                    undo.append(_table(value))
                else:
                    empty.append(value)
            elif kind in _SERIES:
                undo.append(_items(value))
    return undo


def _steps(value: Any) -> Iterator[Callable[[], None]]:
    table = attributes(value)
    if table is not None:
        yield _table(table)
    if isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, dict):
        yield _table(value)
    elif isinstance(value, (list, set, deque)):
        yield _items(value)
    else:
        held = {name: getattr(value, name) for name in slots(value) if hasattr(value, name)}
        if held and not isinstance(value, tuple):
            yield _slots(value, held)


def _emptied(tables: list[dict[Any, Any]]) -> None:
    for table in tables:
        if table:
            kind: Any = OrderedDict if isinstance(table, OrderedDict) else dict
            for key in list(kind.keys(table)):
                kind.__delitem__(table, key)


def _table(table: dict[Any, Any]) -> Callable[[], None]:
    kind: Any = OrderedDict if isinstance(table, OrderedDict) else dict  # a subclass may do more than to store
    keys, values = list(kind.keys(table)), list(kind.values(table))

    def undo() -> None:
        """Entry by entry, as another thread may be reading them; all anew only where their order changed."""
        if same_objects(list(kind.keys(table)), keys) and same_objects(list(kind.values(table)), values):
            return
        own = set(keys)
        for key in [key for key in kind.keys(table) if key not in own]:
            kind.__delitem__(table, key)
        for key, item in zip(keys, values, strict=True):
            if kind.get(table, key, table) is not item:
                kind.__setitem__(table, key, item)
        if not same_objects(list(kind.keys(table)), keys):
            kind.clear(table)
            for key, item in zip(keys, values, strict=True):
                kind.__setitem__(table, key, item)

    return undo


def _items(container: Any) -> Callable[[], None]:
    kind: Any = next(k for k in (list, set, deque) if isinstance(container, k))
    items = list(kind.__iter__(container))

    def undo() -> None:
        if not same_objects(list(kind.__iter__(container)), items):
            kind.clear(container)
            (kind.update if kind is set else kind.extend)(container, items)

    return undo


def _slots(value: Any, held: dict[str, Any]) -> Callable[[], None]:
    def undo() -> None:
        for name, item in held.items():
            if getattr(value, name, None) is not item:
                object.__setattr__(value, name, item)

    return undo


def _tensor(tensor: Tensor) -> Iterator[Callable[[], None]]:
    if tensor.is_leaf:
        yield _gradient(tensor, tensor.requires_grad, tensor.grad)
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided or tensor.is_meta:
        return
    yield _memory(tensor, tensor.data)  # first: by now the values may be those of another of the user's tensors
    # what shows one element at several places cannot be written to
    if not isinstance(tensor, nn.Parameter) and 0 not in tensor.stride():
        yield _values(tensor, tensor.detach().clone())


def _memory(tensor: Tensor, before: Tensor) -> Callable[[], None]:
    def undo() -> None:
        if tensor.data_ptr() != before.data_ptr() or tensor.shape != before.shape or tensor.dtype != before.dtype:
            tensor.data = before

    return undo


def _gradient(tensor: Tensor, flag: bool, grad: Tensor | None) -> Callable[[], None]:
    def undo() -> None:
        if tensor.requires_grad is not flag:
            tensor.requires_grad_(flag)
        if tensor.grad is not grad:
            tensor.grad = grad

    return undo


def _values(tensor: Tensor, before: Tensor) -> Callable[[], None]:
    def undo() -> None:
        if not torch.equal(tensor.detach(), before):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.detach().copy_(before)

    return undo
