"""Channels divided: slices, chunks, splits."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
from torch import Tensor, nn

from .registry import conv, image, network, tokens


@network(image())
class SplitLiteralSwap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 14)
        self.head = conv(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.stem(x), [5, 9], dim=1)
        return self.head(torch.relu(torch.cat([second, first], dim=1)))


@network(image())
class SplitByAttributeList(nn.Module):
    """MixNet: parts of different widths go through convolutions of different kernel sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [4, 8, 6]
        self.stem = conv(3, 18, 1)
        self.parts = nn.ModuleList(conv(n, n, k, groups=n) for n, k in zip(self.widths, (3, 5, 1), strict=True))
        self.head = conv(18, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.stem(x), self.widths, dim=1)
        return self.head(torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1))


@network(image())
class SplitEqualBySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = 6
        self.stem = conv(3, 18)
        self.first = conv(6, 7)
        self.second = conv(6, 7)
        self.third = conv(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.stem(x).split(self.part, 1)
        return self.first(a) + self.second(b).relu() + self.third(c)


@network(image())
class SplitDerivedSizes(nn.Module):
    """Partial convolution (FasterNet): a fraction of the channels is convolved, the rest passes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.convolved = width // 4
        self.untouched = width - self.convolved
        self.stem = conv(3, width)
        self.partial = conv(self.convolved, self.convolved, bias=False)
        self.head = conv(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), [self.convolved, self.untouched], dim=1)
        return self.head(torch.cat((self.partial(a), b), 1))


@network(image())
class TensorSplitUneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 15)
        self.left = conv(4, 6)
        self.right = conv(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tensor_split(self.stem(x), (4,), dim=1)
        return self.left(left) * self.right(right).sigmoid()


@network(image())
class ChunkThreeGates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24)
        self.head = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate, shift = self.stem(x).chunk(3, dim=1)
        return self.head(value * torch.sigmoid(gate) + torch.tanh(shift))


@network(image())
class ChunkByAttribute(nn.Module):
    def __init__(self, branches: int = 4) -> None:
        super().__init__()
        self.branches = branches
        self.stem = conv(3, 5 * branches)
        self.norm = nn.BatchNorm2d(5 * branches)
        self.head = conv(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.norm(self.stem(x)), self.branches, dim=1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part.relu()
        return self.head(total)


@network(image())
class HalvesAddedByLiteral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 14)
        self.head = conv(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y[:, :7] + y[:, 7:])


@network(image())
class HalvesFromShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 18)
        self.left = conv(9, 5)
        self.right = conv(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        half = y.size(1) // 2
        return self.left(y[:, :half]) - self.right(y[:, half:])


@network(image())
class LastChannels(nn.Module):
    """The last eight channels go on; all of them feed the other branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 13)
        self.tail = conv(8, 5)
        self.whole = conv(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.tail(y[:, -8:]) + self.whole(y)


@network(image())
class OnlyLastChannels(nn.Module):
    """The first channels are computed and never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.head = conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x)[:, -6:].relu())


@network(image())
class EvenAndOddChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.head = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.cat([y[:, ::2], y[:, 1::2].tanh()], 1))


@network(image())
class NarrowByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = 4
        self.length = 9
        self.stem = conv(3, 16)
        self.head = conv(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).narrow(1, self.start, self.length).relu())


@network(image())
class SliceByEllipsis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = 6
        self.stem = conv(3, 12)
        self.head = conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y[..., : self.kept, 1:-1, 1:-1] * 2)


@network(image())
class SelectedChannelMask(nn.Module):
    """One channel, selected by a literal, masks the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.head = conv(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        mask = y[:, 0].sigmoid().unsqueeze(1)
        return self.head(y[:, 1:] * mask)


@network(image())
class OverlappingSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.head = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y[:, :8] + y[:, 4:])


@network(image())
class UnboundPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.head = conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        a, b = y.unflatten(1, (8, 2)).unbind(dim=2)
        return self.head(a * b.sigmoid())


@network(image())
class UnboundOuter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 7
        self.stem = conv(3, 14)
        self.head = conv(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        a, b = y.view(len(y), 2, self.width, y.size(-2), y.size(-1)).unbind(1)
        return self.head(torch.maximum(a, b))


@network(tokens(6, 9))
class ClassTokenRows(nn.Module):
    """The first token is sliced off, the rest averaged, both concatenated along the features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 12)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.embed(x))
        return self.head(torch.cat([y[:, 0], y[:, 1:].mean(1)], dim=-1))
