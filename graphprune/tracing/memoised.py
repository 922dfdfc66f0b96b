"""Functions with a cache of their own (`functools.lru_cache`), as code that works out shapes has them.

A cache answers a size with what it computed from an equal number, in this run or another, and so ties together what has
nothing to do with each other. It asks a number for its hash; a traced number therefore looks who asks.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from typing import Any

# How many things in one are looked at.
_MOST = 64
_CACHED = type(functools.lru_cache(lambda: None))
_known: weakref.WeakKeyDictionary[types.CodeType, bool] = weakref.WeakKeyDictionary()


def serves_a_cache(frame: types.FrameType) -> bool:
    """Whether a number that is asked for its hash while `frame` runs is a key in a function's cache.

    It is where the frame is calling something, and its code names a function with a cache.
    """
    code = frame.f_code
    found = _known.get(code)
    if found is None:
        found = _known[code] = _names_a_cache(frame)
    return found and "CALL" in dis.opname[code.co_code[frame.f_lasti]]


def _names_a_cache(frame: types.FrameType) -> bool:
    names, local = frame.f_code.co_names, frame.f_locals
    named = [frame.f_globals.get(name) for name in names]
    if any(_holds_a_cache(value, 2) for value in (*named, *local.values())):
        return True
    # methods and functions of modules: only where the code names such an attribute
    owners = [v if isinstance(v, (type, types.ModuleType)) else type(v) for v in (*named, *local.values())]
    kinds = {id(o): o for o in owners if isinstance(o, types.ModuleType) or o.__module__ != "builtins"}
    return any(isinstance(_attribute(owner, name), _CACHED) for owner in kinds.values() for name in names)


def _holds_a_cache(value: Any, depth: int) -> bool:
    """The value is such a function, or one is in it: in a container, a partial function, an attribute."""
    if isinstance(value, _CACHED):
        return True
    held: Any = ()
    if isinstance(value, functools.partial):
        held = (value.func,)
    elif type(value) in (list, tuple, dict):
        held = list(value.values() if type(value) is dict else value)[:_MOST]
    elif depth == 2 and type(getattr(value, "__dict__", None)) is dict and not isinstance(value, type):
        held = list(vars(value).values())[:_MOST]
    return depth > 0 and any(_holds_a_cache(item, depth - 1) for item in held)


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name)
    found = inspect.getattr_static(owner, name, None)
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
