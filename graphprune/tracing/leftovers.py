"""What a recorded run leaves in caches outside of the model: tensors of its own in global names and class attributes.

`if n not in MASKS: MASKS[n] = torch.ones(n, n)` computes once for all runs. A recording's tensors may have no values,
so they must not stay for the next run of the user's.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..support.interrupts import shielded

_CONTAINERS = (dict, OrderedDict, defaultdict, list)
# Larger containers are no caches of a few tensors.
_MOST = 4096
_names: weakref.WeakKeyDictionary[type, tuple[tuple[dict[str, Any], str], ...]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def without_leftovers(modules: Iterable[nn.Module], made: Callable[[Tensor], bool]) -> Iterator[None]:
    """Afterwards, names and containers that the code of these modules' classes uses hold no tensor for which `made` is
    true: they hold what they held before."""
    kinds = {kind for held in set(map(type, modules)) for kind in held.__mro__ if _is_users(kind)}
    with shielded() as shield:
        tables = {id(table): table for kind in kinds for table in _containers(kind)}
        before = [(table, table.copy()) for table in tables.values()]
        attributes = [(kind, dict(vars(kind))) for kind in kinds]
        try:
            with shield.lifted():
                yield
        finally:
            for table, contents in before:
                values = table.values() if isinstance(table, dict) else table
                if any(isinstance(value, Tensor) and made(value) for value in list(values)):
                    table.clear()
                    table.update(contents) if isinstance(table, dict) else table.extend(contents)
            for kind, contents in attributes:
                for name, value in list(vars(kind).items()):
                    if isinstance(value, Tensor) and made(value):
                        setattr(kind, name, contents[name]) if name in contents else delattr(kind, name)


def _is_users(kind: type) -> bool:
    return not kind.__module__.startswith(("torch.", "builtins", "graphprune."))


def _containers(kind: type) -> Iterator[Any]:
    """Dicts and lists that are attributes of the class, or global names in its functions."""
    values = [*vars(kind).values(), *(table.get(name) for table, name in _globals_of(kind))]
    for value in values:
        if type(value) in _CONTAINERS and len(value) <= _MOST:
            yield value


def _globals_of(kind: type) -> tuple[tuple[dict[str, Any], str], ...]:
    found = _names.get(kind)
    if found is None:
        functions = [f for f in vars(kind).values() if isinstance(f, types.FunctionType)]
        pairs = {(id(f.__globals__), name): (f.__globals__, name) for f in functions for name in f.__code__.co_names}
        found = _names[kind] = tuple(pairs.values())
    return found
