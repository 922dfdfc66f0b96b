"""What stands for an axis in `dynamic_shapes`: a `torch.export.Dim`, a hint, a name or a sum of names."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from ..errors import GraphPruneError

Range = tuple[int, int | None]

_OPERATIONS: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A free axis: its name in the file, and its size as an expression in `symbols`.

    `ranges`: least and largest size of each dim in it, as far as the caller says. `named`: the caller gave it a name.
    `optional`: torch decides whether it is free (`Dim.AUTO`).
    """

    name: str
    expression: sympy.Expr
    ranges: Mapping[str, Range]
    named: bool = True
    optional: bool = False

    def size(self, sizes: Mapping[str, int]) -> Any:
        """Its size where the dims have these sizes: an integer, if all are known."""
        return self.expression.subs({symbol(name): size for name, size in sizes.items()})

    @property
    def dims(self) -> list[str]:
        """The names of the dims in it."""
        return sorted(str(s) for s in self.expression.free_symbols)


def symbol(name: str) -> sympy.Symbol:
    """The unknown that stands for the dim `name`."""
    return sympy.Symbol(name, integer=True)


def dimension(value: Any, place: str, default: str, size: int) -> Dimension | None:
    """What `value` says about an axis that is `size` long in the example; None where it says that it is fixed.

    `place`: the axis in words. `default`: the name of an axis that has none.

    Raises:
        GraphPruneError: it is nothing that `dynamic_shapes` takes.
    """
    if value is None or _hint(value) == "STATIC":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if value != size:
            raise GraphPruneError(f"dynamic_shapes: {place} is {size} long in example_input, not {value}")
        return None
    if isinstance(value, str):
        expression = _parsed(value, place)
        return Dimension(value, expression, {str(s): (0, None) for s in expression.free_symbols})
    if isinstance(value, torch.export.Dim):
        root, expression = _opened(value)
        found: Range = (int(root.min), None if _endless(root.max) else int(root.max))
        return Dimension(value.__name__, expression, {root.__name__: found})
    hint = _hint(value)
    if hint in ("DYNAMIC", "AUTO"):
        bounds: Range = (getattr(value, "min", None) or 0, getattr(value, "max", None))
        return Dimension(default, symbol(default), {default: bounds}, named=False, optional=hint == "AUTO")
    raise GraphPruneError(
        f"dynamic_shapes: {place} is {value!r}; give a name, a torch.export.Dim, Dim.DYNAMIC, Dim.AUTO, or None for a "
        f"fixed size"
    )


def _hint(value: Any) -> str | None:
    """AUTO, DYNAMIC or STATIC, if it is one of torch's hints."""
    name = getattr(getattr(value, "type", None), "name", None)
    return name if type(value).__name__ == "_DimHint" and isinstance(name, str) else None


def _endless(size: Any) -> bool:
    return not isinstance(size, int) and not getattr(size, "is_Integer", False)


def _opened(dim: Any) -> tuple[Any, sympy.Expr]:
    """The dim that another is derived from, and the derived one as an expression in it."""
    functions = []
    while hasattr(dim, "root") and hasattr(dim, "fn"):
        functions.append(dim.fn)
        dim = dim.root
    expression: Any = symbol(dim.__name__)
    for function in reversed(functions):
        expression = function(expression)
    return dim, expression


def _parsed(text: str, place: str) -> sympy.Expr:
    """A name, or names and integers with +, - and * between them."""
    try:
        expression = _expression(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise GraphPruneError(
            f"dynamic_shapes: {place} is called {text!r}; give a name, such as 'length', or a sum of names, such as "
            f"'past + length'"
        ) from error
    if not expression.free_symbols:
        raise GraphPruneError(f"dynamic_shapes: {place} is called {text!r}, in which there is no name")
    return expression


def _expression(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_expression(node.left), _expression(node.right))
    raise ValueError("no sum of names")
