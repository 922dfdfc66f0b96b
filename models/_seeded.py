"""Building a network with reproducible weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def seeded(build: Callable[[], ModelT], seed: int, batch: int) -> tuple[ModelT, Tensor]:
    """The network in eval mode, and a normal random batch (batch, 1, 8, 8), both drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        example = torch.randn(batch, 1, 8, 8)
    model.eval()
    return model, example
