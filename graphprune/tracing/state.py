"""Leave no trace: everything a recording run may change in a model or in the process, put back afterwards."""

from __future__ import annotations

import contextlib
import enum
import math
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import recorded_openly
from .origin import traced_sqrt
from .overrides import python_functions_stay_visible

# nn.Module's own bookkeeping, which is not a size of anything
_INTERNAL = frozenset(
    {
        "training",
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_is_full_backward_hook",
        "_version",
    }
)
# The integers that torch.nn's own modules read in forward. Others (stride, kernel_size...) never follow channels.
_TORCH_NN = frozenset(
    "groups num_groups normalized_shape num_heads embed_dim kdim vdim hidden_size input_size proj_size num_layers "
    "unflattened_size output_size upscale_factor downscale_factor num_features".split()
)


def _traced(value: Any, module: str, name: str, key: tuple[Any, ...], make: Any, depth: int = 0) -> Any:
    """`value` with its integers traced, or `value` itself when it holds none."""
    if type(value) is int:
        return make(value, module, name, key)
    if depth < 2 and type(value) in (tuple, list) and 0 < len(value) <= 64:
        items = [_traced(v, module, name, (*key, i), make, depth + 1) for i, v in enumerate(value)]
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if depth < 2 and type(value) is dict and 0 < len(value) <= 64:
        entries = {k: _traced(v, module, name, (*key, k), make, depth + 1) for k, v in value.items()}
        return entries if any(entries[k] is not value[k] for k in value) else value
    return value


def is_configuration(value: Any) -> bool:
    """A plain object of the user's that holds settings: no module, tensor, class, function or enumeration, and copied
    the ordinary way."""
    kind = type(value)
    return (
        type(getattr(value, "__dict__", None)) is dict
        and not isinstance(value, (nn.Module, Tensor, type, enum.Enum))
        and not callable(value)
        and not kind.__module__.startswith(("torch.", "builtins"))
        and not hasattr(kind, "__deepcopy__")
    )


def configurations(modules: dict[str, nn.Module]) -> dict[int, tuple[str, str, Any]]:
    """The settings objects that modules hold, once each: id -> (path of the first holder, attribute, object)."""
    found: dict[int, tuple[str, str, Any]] = {}
    for path, module in modules.items():
        for name, value in module.__dict__.items():
            if name not in _INTERNAL and id(value) not in found and is_configuration(value):
                found[id(value)] = (path, name, value)
    return found


def trace_attributes(modules: dict[str, nn.Module], make: Any) -> None:
    """Replace integer attributes of `modules`, and those of settings objects that they hold, by
    `make(value, module, name, key)`; `preserved` puts them back."""
    for path, name, settings in configurations(modules).values():
        for key, value in list(settings.__dict__.items()):
            settings.__dict__[key] = _traced(value, path, name, (key,), make)
    for path, module in modules.items():
        known = type(module).__module__.startswith("torch.nn.modules")
        attributes = module.__dict__
        for name in list(attributes):
            if name in _INTERNAL or (known and name not in _TORCH_NN):
                continue
            value = attributes[name]
            traced = _traced(value, path, name, (), make)
            if traced is not value:
                attributes[name] = traced


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices whose random state a run may advance."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; training flags and random state as before afterwards, also after an error.

    The flags are set one by one: `train()` and `eval()` may be overridden to do more (merge adapters, for example).
    """
    flags = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training


def _refill(container: Any, contents: Any) -> None:
    """Give a list, dict or set its earlier contents back."""
    before = list(contents.items()) if type(contents) is dict else list(contents)
    now = list(container.items()) if type(container) is dict else list(container)
    if len(now) != len(before) or any(a is not b and not _same_item(a, b) for a, b in zip(now, before, strict=True)):
        container.clear()
        container.extend(contents) if type(container) is list else container.update(contents)


def _same_item(a: Any, b: Any) -> bool:
    return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(operator.is_, a, b))


@contextlib.contextmanager
def preserved(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Restore attributes, parameter and submodule tables, training flags and random state, also after an error."""
    saved = [
        (
            m,
            dict(m.__dict__),
            {k: dict(m.__dict__[k]) for k in ("_parameters", "_buffers", "_modules") if k in m.__dict__},
        )
        for m in modules.values()
    ]
    containers = [
        (value, value.copy())
        for _, attributes, _ in saved
        for name, value in attributes.items()
        if name not in _INTERNAL and type(value) in (list, dict, set)
    ]
    settings = [(value.__dict__, dict(value.__dict__)) for _, _, value in configurations(modules).values()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for container, contents in containers:
                _refill(container, contents)
            for current, contents in settings:
                current.clear()
                current.update(contents)
            for module, attributes, tables in saved:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for name, table in tables.items():
                    current = module.__dict__[name]
                    if list(map(id, current.values())) != list(map(id, table.values())) or list(current) != list(table):
                        current.clear()
                        current.update(table)


def without_data(modules: dict[str, nn.Module]) -> Callable[[Tensor], Tensor]:
    """Put every parameter and buffer on the meta device; `preserved` puts them back. Returns the mapping, which also
    takes inputs there."""
    known: dict[int, Tensor] = {}
    keep: list[Tensor] = []

    def bare(tensor: Tensor) -> Tensor:
        found = known.get(id(tensor))
        if found is None:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            known[id(tensor)] = found
            keep.append(tensor)
        return found

    for module in modules.values():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = bare(tensor)  # type: ignore[assignment]
    for module in modules.values():  # nn.LSTM and its kin keep a list of their parameters
        for name, value in module.__dict__.items():
            if type(value) is list and value and all(isinstance(v, Tensor) and id(v) in known for v in value):
                module.__dict__[name] = [known[id(v)] for v in value]
    return bare


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Eager, unfused execution, so that the recording shows the parts; `math.sqrt` keeps the history of numbers."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    sqrt = math.sqrt
    torch.backends.mha.set_fastpath_enabled(False)
    math.sqrt = traced_sqrt
    try:
        with python_functions_stay_visible(), recorded_openly():
            yield
    finally:
        math.sqrt = sqrt
        torch.backends.mha.set_fastpath_enabled(fastpath)
