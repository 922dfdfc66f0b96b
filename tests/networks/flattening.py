"""Images, vectors and tokens made into each other: flattening, unflattening, unfolding."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, signal, tokens, variant, vector


@network(image(3, 6))
class ChannelsLastFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.classifier = nn.Linear(10 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.stem(x)).permute(0, 2, 3, 1).flatten(1))


@network(image(3, 6))
class WidthMajorFlatten(nn.Module):
    """Flattened as (width, channel, height): the channel is neither the slowest nor the fastest index."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.classifier = nn.Linear(360, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.stem(x)).permute(0, 3, 1, 2).reshape(x.shape[0], -1))


@network(lambda: torch.randn(2, 2, 4, 4, 4))
class VolumeFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 6, 3, padding=1)
        self.pool = nn.MaxPool3d(2)
        self.classifier = nn.Linear(6 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stem(x)).flatten(1))


@network(image(3, 6))
class LiteralFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.classifier = nn.Linear(360, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.stem(x)).view(-1, 360))


@network(image(3, 6))
class ProductFlatten(nn.Module):
    """The flat size is an attribute computed from another attribute."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.width = width
        self.flat = self.width * 6 * 6
        self.stem = conv(3, width)
        self.classifier = nn.Linear(self.flat, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.stem(x)).view(-1, self.flat))


@network(image(3, 6))
class ShapeFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.classifier = nn.Linear(10 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.classifier(y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)))


class Unflattened(nn.Module):
    """A vector made into an image."""

    def __init__(self, style: str, width: int = 12) -> None:
        super().__init__()
        self.style = style
        self.width = width
        self.project = nn.Linear(7, width * 16)
        self.unflatten = nn.Unflatten(1, (width, 4, 4))
        self.norm = nn.BatchNorm2d(width)
        self.head = conv(width, 3)

    def forward(self, z: Tensor) -> Tensor:
        y = self.project(z)
        if self.style == "rest":
            y = y.view(z.shape[0], -1, 4, 4)
        elif self.style == "literal":
            y = y.view(-1, 12, 4, 4)
        elif self.style == "attribute":
            y = y.reshape(len(z), self.width, 4, 4)
        elif self.style == "channels_last":
            y = y.view(-1, 4, 4, self.width).permute(0, 3, 1, 2)
        else:
            y = self.unflatten(y)
        return self.head(torch.relu(self.norm(y)))


for _style in ("rest", "literal", "attribute", "channels_last", "module"):
    variant(f"unflatten_{_style}", lambda style=_style: Unflattened(style), vector(7))  # type: ignore[misc]


@network(image(3, 4))
class AutoencoderBottleneck(nn.Module):
    """Image to vector and back, with two Linear layers between the flattenings."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = conv(3, 8)
        self.squeeze = nn.Linear(8 * 16, 9)
        self.spread = nn.Linear(9, 8 * 16)
        self.decode = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.encode(x))
        shape = y.shape
        return self.decode(torch.relu(self.spread(self.squeeze(y.flatten(1)))).view(shape))


@network(image(3, 8))
class UnfoldedPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 7)
        self.unfold = nn.Unfold(2, stride=2)
        self.project = nn.Linear(28, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.unfold(torch.relu(self.stem(x))).transpose(1, 2))


@network(image(3, 8))
class UnfoldFoldBlur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 7)
        self.head = conv(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        columns = F.unfold(y, 3, padding=1)
        return self.head(F.fold(columns, y.shape[2:], 3, padding=1) * 0.2)


@network(signal())
class SignalToTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 14, 3, padding=1)
        self.project = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.stem(x)).transpose(1, 2))


@network(tokens(5, 9))
class TokensFlattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 13)
        self.classifier = nn.Linear(5 * 13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.embed(x)).reshape(x.shape[0], -1))
