"""Where in the model an operator is: runtimes name operators, and their converters forget the modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def layer(node: Any) -> str:
    """The name of the innermost module that a node of a `torch.export` program was traced in; "" for the model itself,
    or where it is not known."""
    return _module(node)[0]


def layers_named(program: Any, message: str) -> str:
    """" (in layer, layer)" for the layers whose operators a message names, "" where it names none.

    Operators are known by their ATen names, with and without what a decomposition adds (a leading underscore), or what
    a dialect puts before them ("STABLEHLO_SORT").
    """
    words = {word.strip("_").lower().removeprefix("stablehlo_") for word in re.findall(r"\w+", message)}
    return in_layers(layer(node) for node, name in _calls(program) if name in words)


def in_layers(names: Iterable[str], most: int = 3) -> str:
    """" (in a, b, c and 2 more)", "" where none has a name."""
    distinct = [name for name in dict.fromkeys(names) if name]
    if not distinct:
        return ""
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return f" (in {', '.join(distinct[:most])}{more})"


def listed(counted: Sequence[tuple[str, str]]) -> str:
    """Operators with their layers, as text: "softmax (in head), add (in a, b)"."""
    layers: dict[str, list[str]] = {}
    for operator, where in counted:
        layers.setdefault(operator, []).append(where)
    return ", ".join(
        operator + (f" x {len(where)}" if len(where) > 1 else "") + in_layers(where)
        for operator, where in layers.items()
    )


def place_of(program: Any, operator: str) -> str:
    """` (in module 'blocks.0.norm', LayerNorm)` for the first call of that operator in a `torch.export` program; empty
    where there is none. What stands before its name ("aten::", "torch.") does not count.
    """
    wanted = _plain(operator)
    for node, name in _calls(program):
        # "rfft" is "fft_rfft" among torch's own names.
        if f"_{name}".endswith(f"_{wanted}"):
            return _said(*_module(node))
    return ""


def place_in(graph: Path, operator: str) -> str:
    """The same for the first node of that operator in an ONNX file of torch's exporter."""
    import onnx

    for node in onnx.load(str(graph), load_external_data=False).graph.node:
        if node.op_type == operator:
            facts = {entry.key: entry.value for entry in node.metadata_props}
            try:
                scopes = ast.literal_eval(facts["pkg.torch.onnx.name_scopes"])
                kinds = ast.literal_eval(facts["pkg.torch.onnx.class_hierarchy"])
                # The last is the operator itself.
                return _said(str(scopes[-2]), str(kinds[-2]).rsplit(".", 1)[-1])
            except (KeyError, ValueError, SyntaxError, IndexError, TypeError):
                return f" (node {node.name!r})" if node.name else ""
    return ""


def _calls(program: Any) -> Iterator[tuple[Any, str]]:
    """Nodes of a `torch.export` program that compute, with the plain names of their operators."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            named = schema.name if schema is not None else getattr(node.target, "__name__", node.target)
            yield node, _plain(str(named))


def _module(node: Any) -> tuple[str, str]:
    """The innermost module around a node that has a name, and its class; "" for the model itself."""
    for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        name = str(path).removeprefix("L['self']").removeprefix(".")
        if name:
            return name, (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]
    return "", ""


def _said(module: str, kind: str) -> str:
    return f" (in module {module!r}, {kind})" if module else " (in the forward of the model itself)"


def _plain(operator: str) -> str:
    return operator.rsplit("::", 1)[-1].rsplit(".", 1)[-1].strip("_").lower()
