"""The source of functions as syntax trees, each parsed once."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
import types

# How many functions are remembered.
_MOST = 4096


def tree_of(function: types.FunctionType) -> ast.FunctionDef | None:
    """The definition of a function; None where there is no source, or it is no ordinary function."""
    return _parsed(function.__code__)


@functools.lru_cache(maxsize=_MOST)
def _parsed(code: types.CodeType) -> ast.FunctionDef | None:
    lines = linecache.getlines(code.co_filename)  # what `inspect` does, without a search for the module
    try:
        block = inspect.getblock(lines[code.co_firstlineno - 1 :])
        body = ast.parse(textwrap.dedent("".join(block))).body
    except (SyntaxError, ValueError, IndexError, RecursionError):
        return None
    found = body[0] if body else None
    return found if isinstance(found, ast.FunctionDef) and found.name == code.co_name else None


def function_of(value: object) -> types.FunctionType | None:
    """The function of the user's in a method, a static or class method, or behind a decorator that says what it
    wraps."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    while isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None
