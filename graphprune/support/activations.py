"""What runs with gradients keep for their backward passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .walking import named_tensors


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of activations that `run`, a run of the model with gradients, keeps until its backward pass."""
    held: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in named_tensors(model).values()}

    def packed(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        seen = run()
        del seen
    return sum(held.values())


__all__ = ["kept_bytes"]
