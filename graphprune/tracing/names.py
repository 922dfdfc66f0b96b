"""Names: of a model's tensors in one walk (`named_parameters` walks the tree anew, and recursively, every time), and of
the operators in a recorded graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

# Namespaces whose operators are known by their bare names.
BUILT_IN = frozenset(("aten", "prims", "torchvision"))


def operator_name(node: fx.Node) -> str:
    """The operator a node calls, without its overload: "add" for `aten.add.Tensor`, "library::name" for operators of
    other libraries; "getitem" for an item of a result; "" for nodes that call nothing."""
    return target_name(node.target)


def target_name(target: Any) -> str:
    """`operator_name` of what a node calls."""
    if target is operator.getitem:
        return "getitem"
    name = str(getattr(getattr(target, "overloadpacket", None), "__name__", ""))
    namespace = getattr(target, "namespace", "aten")
    return name if not name or namespace in BUILT_IN else f"{namespace}::{name}"


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, also under the second path of a shared one, in the order of `named_modules`."""
    out: dict[str, nn.Module] = {}

    def walk(path: str, module: nn.Module) -> None:
        out[path] = module
        prefix = path + "." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                walk(prefix + name, child)

    walk("", model)
    return out


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, then all buffers, by name; shared ones under each of their names."""
    modules = all_modules(model)
    out: dict[str, Tensor] = {}
    for table in ("_parameters", "_buffers"):
        for path, module in modules.items():
            held = getattr(module, table)
            if held:
                prefix = path + "." if path else ""
                for name, tensor in held.items():
                    if tensor is not None:
                        out[prefix + name] = tensor
    return out
