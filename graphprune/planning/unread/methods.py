"""Which methods of a class do something with numbers that its objects keep."""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterator

from torch import nn

from ...tracing.blueprints.source import function_of, tree_of


@functools.lru_cache(maxsize=512)
def building(kind: type, names: frozenset[str]) -> tuple[str, ...]:
    """The methods that set an attribute of the object and mention one of these."""
    return tuple(_building(kind, names))


def _building(kind: type, names: frozenset[str]) -> Iterator[str]:
    users = [home for home in kind.__mro__ if not home.__module__.startswith("torch.")]
    for name, value in {name: value for home in reversed(users) for name, value in vars(home).items()}.items():
        function = function_of(value)
        if name in ("__init__", "forward") or function is None or not _mentions(function.__code__, names):
            continue
        tree = tree_of(function)
        if tree is not None and any(_sets_field(node) for node in ast.walk(tree)):
            yield name


@functools.lru_cache(maxsize=512)
def counts_with(kind: type, name: str) -> bool:
    """Whether what the object does when it is called may loop over one of its numbers, or repeat a list by it: plain
    numbers come of that, which a recorded call does not show."""
    waiting, seen = ["forward"], {"__init__"}
    while waiting:
        method = waiting.pop()
        if method in seen:
            continue
        seen.add(method)
        home = next((home for home in kind.__mro__ if method in vars(home)), nn.Module)
        function = function_of(vars(home).get(method))
        tree = None if function is None or home.__module__.startswith("torch.") else tree_of(function)
        for node in ast.walk(tree) if tree is not None else ():
            if _repeats(node) and any(isinstance(n, ast.Attribute) and n.attr == name for n in ast.walk(node)):
                return True
            if isinstance(node, ast.Attribute):
                waiting.append(node.attr)
    return False


def _repeats(node: ast.AST) -> bool:
    """range(n), islice(x, n) and [a] * n."""
    if isinstance(node, ast.Call):
        called = node.func
        return (called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")) in ("range", "islice")
    lists = (ast.List, ast.Tuple, ast.ListComp)
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and (isinstance(node.left, lists) or isinstance(node.right, lists))
    )


def _mentions(code: types.CodeType, names: frozenset[str]) -> bool:
    return not names.isdisjoint(code.co_names) or any(
        _mentions(inner, names) for inner in code.co_consts if isinstance(inner, types.CodeType)
    )


def _sets_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
