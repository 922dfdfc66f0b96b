"""Functions that a copied model holds: what they have kept of the original becomes the copy's."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...support.reach import content_of

_FUNCTIONS = frozenset((types.FunctionType,))


def rebind(pairs: Iterable[tuple[nn.Module, nn.Module]], memo: Mapping[int, Any]) -> None:
    """Make functions anew that remember modules or tensors of the original (`module.forward = lambda x: old(x) * 2`):
    copy.deepcopy takes functions as they are, and the copy would run the original's layers.

    `pairs`: modules and their copies; `memo`: the identity of what was copied -> the copy. Looked at are the attributes
    of modules and their hooks, and lists and dicts among them.
    """
    made: dict[int, Any] = {}
    for old, new in pairs:
        tables: list[tuple[Any, Any]] = [(old.__dict__, new.__dict__)]
        tables += [(v, new.__dict__.get(n)) for n, v in old.__dict__.items() if isinstance(v, (dict, list)) and v]
        for before, after in tables:
            values = before.values() if isinstance(before, dict) else before
            if after is before or type(after) is not type(before) or _FUNCTIONS.isdisjoint(map(type, values)):
                continue
            for key, value in list(after.items() if isinstance(after, dict) else enumerate(after)):
                if isinstance(value, types.FunctionType) and value.__closure__:
                    bound = _bound(value, memo, made)
                    if bound is not value:
                        after[key] = bound


def _bound(value: Any, memo: Mapping[int, Any], made: dict[int, Any]) -> Any:
    """`value` with the copy's modules and tensors in it, or itself where it has none of the original's."""
    if isinstance(value, (nn.Module, Tensor)):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = _bound(value.__self__, memo, made)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    if id(value) not in made:
        made[id(value)] = value  # a function that knows itself
        cells = [_bound_cell(cell, memo, made) for cell in value.__closure__]
        if any(new is not old for new, old in zip(cells, value.__closure__, strict=True)):
            made[id(value)] = _with_cells(value, tuple(cells))
    return made[id(value)]


def _bound_cell(cell: types.CellType, memo: Mapping[int, Any], made: dict[int, Any]) -> types.CellType:
    content = content_of(cell)
    bound = _bound(content, memo, made)
    return cell if bound is content else types.CellType(bound)


def _with_cells(function: types.FunctionType, cells: tuple[types.CellType, ...]) -> types.FunctionType:
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__, new.__doc__, new.__module__ = function.__qualname__, function.__doc__, function.__module__
    new.__dict__.update(function.__dict__)
    return new
