"""A `torch.export` program that was captured in float32, in another dtype: more than `module.to`, as dtypes are in its
code too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def converted(module: Any, dtype: torch.dtype) -> Any:
    """The program in another dtype: parameters, buffers, other constants, and wherever it says float32, such as for the
    first state of an LSTM.

    What is made of integers stays in float32, for positions in bfloat16 would be wrong from 257 on.
    """
    if dtype == torch.float32:
        return module
    for node in list(module.graph.nodes):
        operator = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if operator == "_assert_tensor_metadata":
            module.graph.erase_node(node)
        elif node.op == "call_function" and not _of_integers(node, operator):
            node.args = tuple(dtype if value is torch.float32 else value for value in node.args)
            node.kwargs = {key: dtype if value is torch.float32 else value for key, value in node.kwargs.items()}
            if _makes_float32(node):
                node.kwargs = {**node.kwargs, "dtype": dtype}
    module.recompile()
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(part, name, value.to(dtype))
    return module.to(dtype)


def _makes_float32(node: Any) -> bool:
    """Whether it makes a tensor of the default dtype, which it does not name."""
    value = node.meta.get("val")
    if node.all_input_nodes or node.kwargs.get("dtype") is not None:
        return False
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    return any(argument.name == "dtype" for argument in node.target._schema.arguments)


def _of_integers(node: Any, operator: str) -> bool:
    given = [value.meta.get("val") for value in node.all_input_nodes]
    return operator == "arange" or any(isinstance(v, Tensor) and not v.is_floating_point() for v in given[:1])
