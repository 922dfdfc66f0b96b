"""Channels joined: concatenations, stacks, padded shortcuts."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, variant


@network(image())
class CatNegativeAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = conv(3, 11)
        self.thin = conv(3, 5, 1)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.thin(x), self.wide(x)), dim=-3))


@network(image())
class CatInputFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 9)
        self.norm = nn.BatchNorm2d(12)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(torch.cat([x, self.stem(x)], 1))))


@network(image())
class CatInputBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = conv(3, 7)
        self.right = conv(3, 6)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), x, self.right(x)], 1))


@network(image())
class CatNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)
        self.b = conv(6, 5)
        self.c = conv(11, 7)
        self.d = conv(24, 9)
        self.head = conv(33, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(a)], 1)
        abc = torch.cat([ab, self.c(ab), a], 1)
        return self.head(torch.cat([abc, self.d(abc)], 1).relu())


@network(image())
class CatAddedToCat(nn.Module):
    """Two concatenations with different borders are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(3, 10)
        self.c, self.d = conv(3, 9), conv(3, 7)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1) + torch.cat([self.c(x), self.d(x)], 1))


@network(image())
class CatConstantPlanes(nn.Module):
    """CoordConv: coordinate planes made in forward are concatenated to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, _, h, w = y.shape
        rows = torch.linspace(-1, 1, h, dtype=y.dtype, device=y.device).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w, dtype=y.dtype, device=y.device).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.head(torch.cat([y, rows, columns], dim=1))


@network(image(3, 6))
class DenseGrowth(nn.Module):
    def __init__(self, growth: int = 5) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + i * growth) for i in range(3))
        self.layers = nn.ModuleList(conv(8 + i * growth, growth) for i in range(3))
        self.head = nn.Linear(8 + 3 * growth, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(torch.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Stacked(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a = conv(3, 10)
        self.b = conv(3, 10, 1)
        self.head = conv(20 if how in ("blocked", "interleaved") else 10, 5)

    def forward(self, x: Tensor) -> Tensor:
        pair = [self.a(x), self.b(x)]
        if self.how == "sum":
            y = torch.stack(pair, 1).sum(1)
        elif self.how == "max":
            y = torch.stack(pair).max(dim=0).values
        elif self.how == "mean_last":
            y = torch.stack(pair, -1).mean(-1)
        elif self.how == "blocked":
            y = torch.stack(pair, 1).flatten(1, 2)
        else:
            y = torch.stack(pair, 2).flatten(1, 2)
        return self.head(y.relu())


for _how in ("sum", "max", "mean_last", "blocked", "interleaved"):
    variant(f"stack_{_how}", lambda how=_how: Stacked(how), image())  # type: ignore[misc]


class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is subsampled and padded with zero channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inputs, self.outputs = 8, 14
        self.stem = conv(3, self.inputs)
        self.body = nn.Sequential(
            conv(8, 14, stride=2), nn.BatchNorm2d(14), nn.ReLU(), conv(14, 14), nn.BatchNorm2d(14)
        )
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        short = y[:, :, ::2, ::2]
        if self.how == "literal":
            short = F.pad(short, (0, 0, 0, 0, 3, 3))
        elif self.how == "attribute":
            extra = self.outputs - self.inputs
            short = F.pad(short, (0, 0, 0, 0, extra // 2, extra - extra // 2), "constant", 0.0)
        elif self.how == "shape":
            body = self.body(y)
            return self.head((F.pad(short, (0, 0, 0, 0, 0, body.size(1) - short.size(1))) + body).mean((2, 3)))
        else:
            zeros = short.new_zeros(short.size(0), self.outputs - self.inputs, *short.shape[2:])
            short = torch.cat([short, zeros], 1)
        return self.head(torch.relu(self.body(y) + short).mean((2, 3)))


for _how in ("literal", "attribute", "shape", "zeros"):
    variant(f"padded_shortcut_{_how}", lambda how=_how: PaddedShortcut(how), image())  # type: ignore[misc]


@network(image(3, 6))
class PooledContextConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 9)
        self.head = conv(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        context = F.adaptive_avg_pool2d(y, 1).expand_as(y)
        return self.head(torch.cat([context, y], 1).relu())
