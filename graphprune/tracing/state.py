"""Leave no trace: everything a run may change in a model or in the process, put back afterwards."""

from __future__ import annotations

import collections
import contextlib
import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..support.interrupts import shielded
from ..support.restoring import kept_attributes
from ..support.settings import DICTS, is_named_tuple, is_settings_object, settings_of, with_setting
from ..support.walking import all_modules, first_names, tensors_in
from .attention import RECORDED_OPENLY
from .cloning import ATOMS, INTERNAL
from .origin import traced_sqrt
from .overrides import PYTHON_FUNCTIONS_STAY_VISIBLE
from .patches import Patch, patched_together

# The integers that torch.nn's own modules read in forward. Others (stride, kernel_size...) never follow channels.
_TORCH_NN = frozenset(
    "groups num_groups normalized_shape num_heads embed_dim kdim vdim hidden_size input_size proj_size num_layers "
    "unflattened_size output_size upscale_factor downscale_factor num_features".split()
)


_CONTAINERS = frozenset((tuple, list, dict, set, frozenset, collections.OrderedDict, collections.deque))


def _traced(value: Any, module: str, name: str, key: tuple[Any, ...], make: Any, depth: int = 0) -> Any:
    """`value` with its integers traced, or `value` itself when it holds none."""
    if type(value) is int:
        return make(value, module, name, key)
    named = is_named_tuple(value)
    if depth < 2 and (named or type(value) in (tuple, list)) and 0 < len(value) <= 64:
        items = [_traced(v, module, name, (*key, i), make, depth + 1) for i, v in enumerate(value)]
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return (value._make(items) if named else type(value)(items)) if changed else value
    if depth < 2 and type(value) in DICTS and 0 < len(value) <= 64:
        entries = type(value)((k, _traced(v, module, name, (*key, k), make, depth + 1)) for k, v in value.items())
        return entries if any(entries[k] is not value[k] for k in value) else value
    return value


def configurations(modules: dict[str, nn.Module]) -> dict[int, tuple[str, str, Any]]:
    """The settings objects that modules hold, once each: id -> (path of the first holder, attribute, object)."""
    found: dict[int, tuple[str, str, Any]] = {}
    for path, module in modules.items():
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in ATOMS or kind in _CONTAINERS or name in INTERNAL or id(value) in found:
                continue
            if is_settings_object(value):
                found[id(value)] = (path, name, value)
    return found


def trace_attributes(modules: dict[str, nn.Module], make: Any) -> None:
    """Replace integer attributes of `modules`, and those of settings objects that they hold, by
    `make(value, module, name, key)`."""
    for path, name, settings in configurations(modules).values():
        for key, value in settings_of(settings).items():
            traced = _traced(value, path, name, (key,), make)
            if traced is not value:
                with_setting(settings, key, traced)
    for path, module in modules.items():
        attributes = module.__dict__
        known = type(module).__module__.startswith("torch.nn.modules")
        for name in _TORCH_NN.intersection(attributes) if known else [n for n in attributes if n not in INTERNAL]:
            value = attributes[name]
            traced = _traced(value, path, name, (), make)
            if traced is not value:
                attributes[name] = traced


def _cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """The CUDA devices whose random state a run may advance."""
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; training flags, random state and what modules hold as before afterwards, also after
    an error or an interrupt.

    The flags are set one by one: `train()` and `eval()` may be overridden to do more (merge adapters, for example).
    """
    found = first_names(all_modules(model))
    modules, devices = list(found.values()), _cuda_devices(tensors_in(found).values())
    with shielded() as shield, torch.random.fork_rng(devices=devices), torch.no_grad():
        undo = kept_attributes(modules)
        try:
            for module in modules:
                if module.training:
                    module.training = False
            with shield.lifted():
                yield
        finally:
            for step in undo:
                step()


class RandomState:
    """The state of the random number generators that a run may advance."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """`tensors`: the model's, which say on which devices it may draw."""
        self.devices = _cuda_devices(tensors)
        self.torch = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]
        self.seed = torch.initial_seed()
        self.numpy: tuple[Any, ...] = np.random.get_state()  # type: ignore[assignment]
        self.python = random.getstate()

    def put_back(self, drawn: bool) -> None:
        """`drawn`: the run drew numbers from torch; where it did not, other threads may have."""
        if drawn or self.seed != torch.initial_seed():
            torch.set_rng_state(self.torch)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
        if random.getstate() != self.python:
            random.setstate(self.python)
        kind, words, *rest = np.random.get_state()
        if not np.array_equal(words, self.numpy[1]) or (kind, *rest) != (self.numpy[0], *self.numpy[2:]):
            np.random.set_state(self.numpy)


_UNFUSED = (
    Patch(torch.backends.mha, "get_fastpath_enabled", lambda _: lambda: False),
    Patch(math, "sqrt", lambda _: traced_sqrt),
    *PYTHON_FUNCTIONS_STAY_VISIBLE,
    RECORDED_OPENLY,
)


def unfused(*more: Patch) -> contextlib.AbstractContextManager[None]:
    """Eager, unfused execution on this thread, so that what runs shows its parts; `math.sqrt` keeps the history of
    numbers. `more`: in place as well."""
    return patched_together((*_UNFUSED, *more))
