"""Run a recorded graph with nothing but its nodes, and take a full picture of a model and of the process."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.tracing.trace import Trace
from tests.oracles import tensors_in


def arguments(example: Any) -> list[Any]:
    """The arguments of a call in the order in which the example names them."""
    if isinstance(example, Mapping):
        return list(example.values())
    return list(example) if isinstance(example, (tuple, list)) else [example]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in leaves(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in leaves(item)]
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        return [t for item in vars(value).values() for t in leaves(item)]
    return []


def replay(trace: Trace, model: nn.Module, example: Any) -> list[Tensor]:
    """The recorded calls in order, on copies of the model's tensors: the graph's outputs."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = leaves(arguments(example))
    env: dict[fx.Node, Any] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[int(node.target.rpartition("_")[2])].clone()
        elif node.op == "get_attr":
            source = named[node.target] if "parameter" in node.meta else trace.constants[node.target]
            env[node] = source.detach().clone()
        elif node.op == "output":
            return [env[n] for n in node.args[0]]
        else:
            assert node.op == "call_function"
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if node.target is not operator.getitem:
                assert isinstance(node.target, torch._ops.OpOverload), node.target
            env[node] = node.target(*args, **kwargs)
    raise AssertionError("the graph has no output node")


def distinct(outputs: Any) -> list[Tensor]:
    """Output tensors, each once; caches are no output."""
    return list({id(t): t for t in tensors_in(outputs)}.values())


def picture_of_model(model: nn.Module) -> dict[str, Any]:
    """Everything reachable from a model's modules: identities, types and values."""
    out: dict[str, Any] = {}
    for path, module in model.named_modules():
        out[f"{path}: class"] = type(module)
        for name, value in module.__dict__.items():
            out[f"{path}.{name}: identity"] = id(value)
            out[f"{path}.{name}: contents"] = _contents(value)
        for table in ("_parameters", "_buffers", "_modules"):
            out[f"{path}.{table}"] = [(k, id(v)) for k, v in module.__dict__[table].items()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        out[f"{name}: value"] = None if tensor.is_meta else tensor.detach().clone()
        out[f"{name}: flags"] = (
            tensor.requires_grad,
            tensor.dtype,
            tensor.stride(),
            tensor.grad is None,
            tensor.device,
        )
        out[f"{name}: attributes"] = sorted(vars(tensor))
    return out


def _contents(value: Any, depth: int = 0) -> Any:
    """Containers by structure, numbers by type and value, tensors by value, all else by identity."""
    if depth > 6:
        return id(value)
    if isinstance(value, Mapping):
        return [(type(k), k, _contents(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, (tuple, list)):
        return [type(value), *(_contents(v, depth + 1) for v in value)]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return (type(value), value)
    if isinstance(value, Tensor):
        numbers = None if value.is_meta else value.detach().reshape(-1).tolist()
        return (id(value), tuple(value.shape), repr(numbers), sorted(vars(value)))
    return id(value)


def picture_of_process() -> dict[str, Any]:
    """Random states, modes and the functions that recording replaces for a while."""
    functional = torch.nn.functional
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch random": torch.get_rng_state(),
        "numpy random": (kind, keys.tobytes(), position, has_gauss, cached),
        "python random": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "math.sqrt": math.sqrt,
        "module call": nn.Module.__call__,
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "dispatch modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "functional": {k: v for k, v in vars(functional).items() if "torch_function" in k},
        "torch.functional": {k: v for k, v in vars(torch.functional).items() if "torch_function" in k},
        "torch._tensor": {k: v for k, v in vars(torch._tensor).items() if "torch_function" in k},
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two pictures differ."""
    found = sorted(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        equal = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not equal:
            found.append(key)
    return found
