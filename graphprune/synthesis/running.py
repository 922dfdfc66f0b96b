"""Runs of the user's model that inputs are made with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.randomness import seed_epoch
from ..support.restoring import restored
from ..support.walking import named_tensors
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
    """What the batch norms read when the model is called."""
    with Watching() as watching:
        run_model(model, inputs, "synthesize")
    seen: list[Seen] = watching.seen
    return seen


def check_values(model: nn.Module) -> None:
    """Raise GraphPruneError for a model without values."""
    if any(t.is_meta for t in named_tensors(model).values()):
        raise GraphPruneError("synthesize: the model is on the meta device and has no values; load its weights first")


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    return next((t.device for t in named_tensors(model).values()), torch.device("cpu"))


def kept_bytes(model: nn.Module, inputs: ExampleInput) -> int:
    """Bytes of activations that a run with gradients keeps until its backward pass."""
    held: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in named_tensors(model).values()}

    def packed(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        seen = run_seen(model, inputs)
        del seen
    return sum(held.values())
