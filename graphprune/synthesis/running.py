"""Runs of the user's model that inputs are made with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import GraphPruneError
from ..plans.surgery import clone_with
from ..support.randomness import seed_epoch
from ..support.restoring import restored
from ..support.walking import all_modules, first_names, named_tensors
from ..tracing.example import ExampleInput
from ..tracing.state import RandomState, evaluating
from ..tracing.trace import run_model
from .norms import Seen, Watching


@contextlib.contextmanager
def model_at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode inside. Afterwards the model, its gradients and buffers and the random state are as before."""
    random = RandomState(named_tensors(model).values())
    try:
        with restored(model), evaluating(model):
            yield
    finally:
        random.put_back(True)


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator for noise, and the same seed for what the model itself draws: a function of both numbers alone."""
    seed_epoch(seed, number)
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def run_seen(model: nn.Module, inputs: ExampleInput) -> list[Seen]:
    """What the batch norms read when the model is called: those that call torch's, and modules that compute with a
    `running_mean` and `running_var` of their own, as torchvision's frozen ones do."""
    own: list[tuple[Tensor, Seen]] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() > 1 and args[0].is_floating_point():
            mean, variance = _stored(module)
            own.append((mean, Seen.of(args[0], mean, variance, float(getattr(module, "eps", 1e-5)))))

    modules = first_names(all_modules(model)).values()
    handles = [m.register_forward_pre_hook(look) for m in modules if not isinstance(m, _NormBase) and _stored(m)]
    try:
        with Watching() as watching:
            run_model(model, inputs, "synthesize")
    finally:
        for handle in handles:
            handle.remove()
    return [*watching.seen, *(seen for mean, seen in own if mean.data_ptr() not in watching.means)]


def _stored(module: nn.Module) -> tuple[Tensor, ...]:
    """Mean and variance that a module stores, one number for each channel; nothing where it does not."""
    found = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    return tuple(t.detach() for t in found if t is not None and t.dim() == 1) if None not in found else ()


def check_values(model: nn.Module) -> None:
    """Raise GraphPruneError for a model without values."""
    if any(t.is_meta for t in named_tensors(model).values()):
        raise GraphPruneError("synthesize: the model is on the meta device and has no values; load its weights first")


def differentiable(model: nn.Module) -> nn.Module:
    """The model; a copy of one that was made under `torch.inference_mode()`, which no gradient goes through."""
    return clone_with(model, {}) if any(t.is_inference() for t in named_tensors(model).values()) else model


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    return next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
