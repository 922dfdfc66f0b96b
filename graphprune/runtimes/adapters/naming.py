"""Layers of a `torch.export` program, for messages about operators."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def layer(node: Any) -> str:
    """The name of the innermost module that a node was traced in; "" for the model itself, or where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return next((path for path in reversed(paths) if path), "")


def layers_named(program: Any, message: str) -> str:
    """" (in layer, layer)" for the layers whose operators a message names, "" where it names none.

    Operators are known by their ATen names, with and without what a decomposition adds (a leading underscore).
    """
    words = {word.strip("_") for word in re.findall(r"\w+", message)}
    found = [
        layer(node)
        for node in program.graph.nodes
        if node.op == "call_function" and _aten_name(node.target).strip("_") in words
    ]
    return in_layers(found)


def in_layers(names: Iterable[str], most: int = 3) -> str:
    """" (in a, b, c and 2 more)", "" where none has a name."""
    distinct = [name for name in dict.fromkeys(names) if name]
    if not distinct:
        return ""
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return f" (in {', '.join(distinct[:most])}{more})"


def first_lines(error: BaseException, lines: int = 2) -> str:
    """The kind of an error, and the first lines of it that say something."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(said[:lines])[:500]}" if said else type(error).__name__


def listed(counted: Sequence[tuple[str, str]]) -> str:
    """Operators with their layers, as text: "softmax (in head), add (in a, b)"."""
    layers: dict[str, list[str]] = {}
    for operator, where in counted:
        layers.setdefault(operator, []).append(where)
    return ", ".join(
        operator + (f" x {len(where)}" if len(where) > 1 else "") + in_layers(where)
        for operator, where in layers.items()
    )


def _aten_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[-1]
