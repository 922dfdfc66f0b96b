"""Depthwise separable convolutions in inverted residuals (Sandler et al. 2018, arXiv:1801.04381) for 8 x 8 digits."""

from __future__ import annotations

from torch import Tensor, nn

from ._seeded import seeded


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise, linear 1 x 1 projection; a residual where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class DigitsMobileNet(nn.Module):
    """(batch, 1, 8, 8) -> (batch, classes) logits."""

    def __init__(self, width: int = 24, expansion: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1, expansion),
            InvertedResidual(width, 2 * width, 2, expansion),
            InvertedResidual(2 * width, 2 * width, 1, expansion),
            InvertedResidual(2 * width, 3 * width, 2, expansion),
            InvertedResidual(3 * width, 3 * width, 1, expansion),
        )
        self.last = nn.Sequential(
            nn.Conv2d(3 * width, 8 * width, 1, bias=False), nn.BatchNorm2d(8 * width), nn.ReLU6()
        )
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(8 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.head(y.mean(dim=(2, 3)))
        return logits


def digits_mobilenet(
    width: int = 24, expansion: int = 4, classes: int = 10, *, batch: int = 1, seed: int = 0
) -> tuple[DigitsMobileNet, Tensor]:
    """A chain of depthwise separable blocks (about 0.13 M parameters) and an example input."""
    return seeded(lambda: DigitsMobileNet(width, expansion, classes), seed, batch)
