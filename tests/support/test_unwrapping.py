"""Data-parallel and compiled models: the module inside is pruned, and the model stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from graphprune.support.unwrapping import unwrapped
from tests import oracles

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def compiled(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled,
        lambda m: nn.DataParallel(compiled(m)),
        lambda m: nn.Sequential(compiled(m), nn.Conv2d(4, 3, 1)),
    ],
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = wrap(net())
    plan = graphprune.plan(model, X, 0.5)
    small = graphprune.prune(model, X, 0.5)  # which proves it
    assert type(small) is type(unwrapped(model)), "the module inside the wrapper"
    widths = {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)}
    assert 4 in widths and 8 not in widths
    plain = nn.Sequential(*(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ReLU))))
    assert oracles.relative_error(model(X), plain(X)) < 1e-6, "the wrapped model computes what it did"
    assert plan.removed
    small(X).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert unwrapped(model) is unwrapped(unwrapped(model))
