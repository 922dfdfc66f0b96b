"""Objects that hold tensors and can be made anew with others: registered pytree classes, and caches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils import _pytree

from ..support.settings import is_plain_object


@dataclasses.dataclass(frozen=True)
class Opened:
    """What lies in an object, the name of each part, and the object made of other parts."""

    keys: tuple[str, ...]
    parts: tuple[Any, ...]
    rebuild: Callable[[Sequence[Any]], Any]


def opened(value: Any) -> Opened | None:
    """The parts of an object of a class that is registered with `torch.utils._pytree`, as `torch.export` sees them.

    None for everything else: tensors, tuples, lists and dicts, of which the callers know more, among them.
    """
    kind = type(value)
    if isinstance(value, (tuple, list, Mapping)) or kind not in _pytree.SUPPORTED_NODES:
        return None
    node = _pytree.SUPPORTED_NODES[kind]
    parts, context = node.flatten_fn(value)
    named = getattr(node, "flatten_with_keys_fn", None)
    keys = [_key(entry) for entry, _ in named(value)[0]] if named is not None else [str(i) for i in range(len(parts))]
    return Opened(tuple(keys), tuple(parts), lambda new: node.unflatten_fn(list(new), context))


def is_cache(value: Any) -> bool:
    """Whether the class of an object, or a base of it, has a name that ends in "Cache"."""
    return any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


def is_holder(value: Any, inside: bool) -> bool:
    """Whether it is a cache that no pytree class is registered for, or (`inside`) a plain object that lies in one."""
    return is_plain_object(value) and not isinstance(value, Mapping) and (inside or is_cache(value))


def remade(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a plain object, each of its attributes replaced by `change` of it."""
    new = copy.copy(value)
    new.__dict__.update({name: change(item) for name, item in vars(value).items()})
    return new


def _key(entry: Any) -> str:
    """The name of a pytree key: of a mapping, of a sequence or of an attribute."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)
