"""Small networks whose batch norms have seen data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def trained(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model after runs in training mode; in eval mode."""
    model.train()
    for x in inputs:
        model(x)
    return model.eval()


def convolutional(low: float = -1.0, high: float = 1.0) -> nn.Module:
    """Two convolutions with batch norms, whose statistics are those of images between `low` and `high`."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    smooth = [nn.functional.interpolate(torch.rand(32, 3, 4, 4), size=(8, 8)) for _ in range(30)]
    return trained(model, *(low + (high - low) * x for x in smooth))


class Several(nn.Module):
    """Images, features in a pair beside a number, and a class by its index; what comes back is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        self.linear, self.norm2 = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.table, self.head = nn.Embedding(3, 6), nn.Linear(6, 2)

    def forward(self, image: Tensor, pair: tuple[Tensor, float], kind: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.conv(image)).relu().mean(2) + self.norm2(self.linear(pair[0] * pair[1]))
        return {"out": self.head(x + self.table(kind)) + mask.sum() * 0}


def several() -> tuple[nn.Module, dict[str, Any]]:
    """The network and its arguments."""
    torch.manual_seed(0)
    model = Several()
    example: dict[str, Any] = {
        "image": torch.randn(2, 2, 7), "pair": (torch.randn(2, 5), 0.5), "kind": torch.tensor([2, 1]),
        "mask": torch.zeros(4, 4),
    }  # fmt: skip
    for _ in range(10):
        model(**{**example, "image": torch.randn(2, 2, 7) * 3 + 1, "pair": (torch.randn(2, 5), 0.5)})
    return model.eval(), example


class Chain(nn.Module):
    """Says after token i nearly always i + 1; `ahead`: looks at the token behind. `fixed`: the one length it takes."""

    def __init__(self, tokens: int = 11, ahead: bool = False, fixed: int | None = None) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(tokens, tokens), nn.Linear(tokens, tokens)
        self.ahead, self.fixed = ahead, fixed
        with torch.no_grad():
            self.table.weight.copy_(torch.eye(tokens))
            self.head.weight.copy_(20 * torch.eye(tokens).roll(1, 0))

    def forward(self, ids: Tensor) -> Tensor:
        if self.fixed is not None and ids.shape[1] != self.fixed:
            raise ValueError("another length")
        x = self.table(ids)
        if self.ahead:
            x = x + x.roll(-1, 1)
        found: Tensor = self.head(x)
        return found
