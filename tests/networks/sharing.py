"""Shared, tied, frozen and unused parameters."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, vector, words


@network(words())
class TiedEmbedding(nn.Module):
    """The output layer is the embedding table itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up, self.down = nn.Linear(12, 18), nn.Linear(18, 12)
        self.output = nn.Linear(12, 20, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.output(y + self.down(torch.relu(self.up(y))))


@network(words())
class TiedEmbeddingByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.mix = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embed(x))), self.embed.weight)


@network(words())
class SummedEmbeddings(nn.Module):
    """Word, position and type tables are added; positions come from a buffer, a bag of words joins at the end."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.kind = nn.Embedding(20, 14), nn.Embedding(8, 14), nn.Embedding(2, 14)
        self.bag = nn.EmbeddingBag(20, 9, mode="mean")
        self.register_buffer("positions", torch.arange(8)[None])
        self.head = nn.Linear(23, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.word(x) + self.position(self.positions[:, : x.size(1)]) + self.kind(torch.zeros_like(x))
        return self.head(torch.cat([torch.relu(y).mean(1), self.bag(x)], 1))


@network(image(3, 6))
class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.left, self.right = conv(12, 12), conv(12, 12)
        self.right.weight = self.left.weight
        self.head = conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(self.left(y)) + self.right(torch.relu(y)))


@network(image(3, 6))
class ModuleCalledThrice(nn.Module):
    """One convolution with its norm applied three times in a loop: its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 10)
        self.body, self.norm = conv(10, 10, bias=False), nn.BatchNorm2d(10)
        self.head = conv(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for _ in range(3):
            y = torch.relu(self.norm(self.body(y)))
        return self.head(y)


@network(lambda: (torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)))
class SiameseTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 11, stride=2), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(99, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.tower(a) - self.tower(b)).abs())


@network(image(3, 6))
class AlternativeReaders(nn.Module):
    """One Linear reads two different features: both must lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 12), conv(3, 12, 1)
        self.read = nn.Linear(12, 8)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).mean((2, 3)), self.right(x).amax((2, 3))
        return self.head(torch.cat([self.read(left), self.read(right)], 1))


@network(image(3, 6))
class FrozenParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 12), nn.BatchNorm2d(12)
        self.body = conv(12, 10)
        self.head = conv(10, 5)
        self.stem.requires_grad_(False)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))))


@network(image(3, 6))
class EverythingFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = conv(3, 12), nn.BatchNorm2d(12), conv(12, 5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


@network(vector())
class HalfUsedParameters(nn.Module):
    """A parameter never read, and a table of which forward reads two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 12)
        self.unused = nn.Linear(12, 12)
        self.table = nn.Parameter(torch.randn(4, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(x) * self.table[1] + self.table[3]))
