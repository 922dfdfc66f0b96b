"""Methods of a model that run a part of it: what is inside for `forward` is an interface for whoever calls them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator

from torch import nn

from ...dependency import DependencyGraph, Group
from ...tracing.blueprints.source import function_of, tree_of


@dataclasses.dataclass(frozen=True)
class Interface:
    """A method other than `forward`, such as `encode`, that runs some of the model's modules and not all.

    `modules`: those. `layers`: the layers that make the channels which lie on its border, made inside and read outside
    or the other way round: `ignore=` of these holds them, so that the method takes and gives what it did before.
    """

    method: str
    modules: tuple[str, ...]
    layers: tuple[str, ...]


def interfaces_of(model: nn.Module, graph: DependencyGraph) -> tuple[Interface, ...]:
    """The public methods of the model's class on whose border channels lie that can go."""
    found = []
    for method, modules in _parts(model):
        layers = tuple(dict.fromkeys(layer for g in graph.groups if (layer := _at_border(g, modules))))
        if layers:
            found.append(Interface(method, modules, layers))
    return tuple(found)


def _at_border(group: Group, modules: tuple[str, ...]) -> str:
    """The last layer that makes the channels of a group which some of these modules share with others, before they get
    to the others or from these; "" if there are none."""
    owners = [(m.parameter.rpartition(".")[0], m.role) for m in group.members]
    inside = tuple(f"{path}." for path in modules)
    makers = [(path, f"{path}.".startswith(inside)) for path, role in owners if role == "out"]
    readers = {f"{path}.".startswith(inside) for path, role in owners if role == "in"}
    if not makers or readers <= {makers[0][1]}:
        return ""
    return next(path for path, side in reversed(makers) if side == makers[0][1])


def _parts(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The public methods of the user's that run some of the modules, with these."""
    kind = type(model)
    whole = _run_by(kind, "forward", model)
    users = [home for home in kind.__mro__ if not home.__module__.startswith(("torch.", "builtins"))]
    for name in dict.fromkeys(name for home in users for name in vars(home)):
        if name == "forward" or name.startswith("_"):
            continue
        modules = _run_by(kind, name, model)
        if modules and modules < whole:
            yield name, tuple(path for path in model._modules if path in modules)


def _run_by(kind: type, name: str, model: nn.Module) -> set[str]:
    """The modules inside `model` that a method runs, by itself or by other methods."""
    found: set[str] = set()
    waiting, seen = [name], set[str]()
    while waiting:
        method = waiting.pop()
        if method in seen:
            continue
        seen.add(method)
        for function in _functions(inspect.getattr_static(kind, method, None)):
            mine = _called(function)
            found |= {child for child in mine if model._modules.get(child) is not None}
            waiting += [child for child in mine if child not in model._modules]
    return found


def _called(function: types.FunctionType) -> set[str]:
    """What of `self` a function calls: `self.a(x)`, `self.a[i](x)`, and what it loops over."""
    tree = tree_of(function)
    steps = list(ast.walk(tree)) if tree is not None else []
    nodes: list[ast.expr] = [step.iter for step in steps if isinstance(step, ast.For)]
    for step in steps:
        if isinstance(step, ast.Call):
            nodes.append(step.func.value if isinstance(step.func, ast.Subscript) else step.func)
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _functions(value: object) -> Iterator[types.FunctionType]:
    """A method's function, and what a decorator holds that does not say what it wraps."""
    function = function_of(value)
    if function is None:
        return
    yield function
    for cell in function.__closure__ or ():
        try:
            inner = cell.cell_contents
        except ValueError:
            continue
        if isinstance(inner, types.FunctionType):
            yield inner


__all__ = ["Interface", "interfaces_of"]
