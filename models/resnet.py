"""A ResNet with basic blocks (He et al. 2016, arXiv:1512.03385) for 8 x 8 digits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ._seeded import seeded


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """(batch, 1, 8, 8) -> (batch, classes) logits; every stage after the first halves the resolution.

    `widths` gives the channels of each stage, `blocks` the number of basic blocks per stage.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        inputs = widths[0]
        for index, width in enumerate(widths):
            stage: list[nn.Module] = []
            for block in range(blocks):
                stage.append(BasicBlock(inputs, width, stride=2 if index and not block else 1))
                inputs = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stages(self.stem(x))
        logits: Tensor = self.head(y.mean(dim=(2, 3)))
        return logits


def digits_resnet(
    widths: Sequence[int] = (32, 64, 128), blocks: int = 2, classes: int = 10, *, batch: int = 1, seed: int = 0
) -> tuple[DigitsResNet, Tensor]:
    """The demo's network (about 0.7 M parameters, 6 M multiply-accumulates per image) and an example input."""
    return seeded(lambda: DigitsResNet(widths, blocks, classes), seed, batch)
