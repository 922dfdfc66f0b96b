"""Names of the operators in a recorded graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

# Namespaces whose operators are known by their bare names.
BUILT_IN = frozenset(("aten", "prims", "torchvision"))


def operator_name(node: fx.Node) -> str:
    """The operator a node calls, without its overload: "add" for `aten.add.Tensor`, "library::name" for operators of
    other libraries; "getitem" for an item of a result; "" for nodes that call nothing."""
    found: str | None = node.meta.get("operator")  # where it was recorded
    if found is None:
        found = target_name(node.target) if node.op == "call_function" else ""
    return found


def target_name(target: Any) -> str:
    """`operator_name` of what a node calls."""
    if target is operator.getitem:
        return "getitem"
    name = str(getattr(getattr(target, "overloadpacket", None), "__name__", ""))
    namespace = getattr(target, "namespace", "aten")
    return name if not name or namespace in BUILT_IN else f"{namespace}::{name}"
