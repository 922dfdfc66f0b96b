"""Where in the model an operator of a program is: runtimes name operators, and their converters forget the modules."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any


def place_of(program: Any, operator: str) -> str:
    """` (in module 'blocks.0.norm', LayerNorm)` for the first call of that operator in a `torch.export` program; empty
    where there is none. What stands before its name ("aten::", "torch.") does not count.
    """
    wanted = _plain(operator)
    for node in program.graph.nodes:
        # "rfft" is "fft_rfft" among torch's own names.
        if node.op == "call_function" and f"_{_plain(_name(node.target))}".endswith(f"_{wanted}"):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path, kind = stack[-1] if stack else ("", "")
            kind = kind if isinstance(kind, str) else kind.__name__
            return _said(str(path).removeprefix("L['self']").removeprefix("."), kind.rsplit(".", 1)[-1])
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


def _said(module: str, kind: str) -> str:
    return f" (in module {module!r}, {kind})" if module else " (in the forward of the model itself)"


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return str(schema.name) if schema is not None else str(getattr(target, "__name__", target))


def _plain(operator: str) -> str:
    return operator.rsplit("::", 1)[-1].rsplit(".", 1)[-1].strip("_").lower()
