"""Numbers that the code reads out of tensors: what they depend on stays, the rest is pruned and proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests import oracles


class Scaled(nn.Module):
    """Features times a plain number."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 4, 1)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.stem(x).relu())
        out: Tensor = self.head(y * self.number(y))
        return out


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("number", "held"),
    [
        (lambda y: float(y.mean()), True),
        (lambda y: y.mean().item(), True),
        (lambda y: y.softmax(1).amax((2, 3)).sum().item(), True),
        (lambda y: float(y[:, :, 0].abs().mean((1, 2))[0]), True),
        (lambda y: 2.0 if y.mean() > -99 else 1.0, False),
        (lambda y: float(y.shape[0]), False),
    ],
)
def test_numbers_read_from_features(number: Callable[[Tensor], float], held: bool) -> None:
    torch.manual_seed(0)
    model = Scaled(number).eval()
    plan = graphprune.plan(model, X, 0.5)
    assert (0 not in plan.removed["middle.weight"]) == held and len(plan.removed["stem.weight"][0]) == 8
    assert any("a number that the code reads from a tensor" in line for line in plan.frozen) == held
    small = graphprune.prune(model, X, 0.5)  # which proves it
    want = oracles.zero_reference(model, plan.removed)(X.double())
    assert oracles.relative_error(small(X), want) < 1e-5
