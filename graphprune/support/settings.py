"""Settings: the values by name that a user's code keeps in an object of its own - a configuration, a dataclass, a
namespace, a dict, a named tuple."""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NOT_THE_USERS = ("torch.", "builtins", "logging")
_NO_OBJECTS = (nn.Module, Tensor, type, enum.Enum, types.FunctionType, types.MethodType)
# What `copy.copy` copies the ordinary way, and what does something when it is gone, is no plain object.
_SPECIAL = ("__deepcopy__", "__copy__", "__del__")
# Of the standard library's classes those that only hold what they are given.
_OPEN = frozenset(("__main__", "argparse", "collections", "dataclasses", "types"))
DICTS = (dict, OrderedDict)


def is_settings(value: Any) -> bool:
    """Whether it holds settings: an object as in `is_settings_object`, a dict whose keys are texts, a named tuple."""
    if type(value) in DICTS:
        return all(isinstance(name, str) for name in value)
    return is_named_tuple(value) or is_settings_object(value)


def is_settings_object(value: Any) -> bool:
    """Whether it is an object of a class of the user's that holds settings, in attributes or as a dict of a class of
    its own: no module, tensor, class, function, enumeration or other callable, and copied the ordinary way. Modules
    share such an object, and a change is one for all of them; each has its own dict and tuple."""
    return is_plain_object(value) and not callable(value) and type(value).__module__ != "collections"


def is_plain_object(value: Any) -> bool:
    """An object of a class of the user's with a `__dict__`, copied the ordinary way."""
    return _is_plain(type(value)) and isinstance(getattr(value, "__dict__", None), dict)


def is_named_tuple(value: Any) -> bool:
    """Whether it is a tuple whose places have names."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def settings_of(value: Any) -> dict[str, Any]:
    """The settings by name. `value`: as in `is_settings`."""
    if is_named_tuple(value):
        return dict(zip(value._fields, value, strict=True))
    found: dict[str, Any] = dict(getattr(value, "__dict__", ()))
    if isinstance(value, dict):  # a class of the user's may read and write otherwise
        found.update((name, item) for name, item in dict.items(value) if isinstance(name, str))
    return found


def with_setting(value: Any, name: str, new: Any) -> Any:
    """`value` with another value for one of its settings, wherever it keeps it: the same object, or of a named tuple
    another. What its class does when it is set (checks, frozen dataclasses) is passed over."""
    if is_named_tuple(value):
        return value._replace(**{name: new})
    table = getattr(value, "__dict__", {})
    if name in table:
        dict.__setitem__(table, name, new)
    if isinstance(value, dict) and dict.__contains__(value, name):
        dict.__setitem__(value, name, new)
    return value


def _look(kind: type) -> bool:
    home = kind.__module__.partition(".")[0]
    foreign = home in sys.stdlib_module_names - _OPEN or kind.__module__.startswith(NOT_THE_USERS)
    special = any(hasattr(kind, name) for name in _SPECIAL)
    return not (foreign or special or issubclass(kind, _NO_OBJECTS))


# bounded: it keeps classes alive, which code may make by the dozen
_is_plain: Callable[[type], bool] = functools.lru_cache(maxsize=4096)(_look)
