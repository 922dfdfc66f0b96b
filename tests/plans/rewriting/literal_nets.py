"""Networks in which a size written in the code blocks: one per kind of size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = Callable[[], tuple[nn.Module, Any, Any]]  # model, example, an example of other sizes
NETS: dict[str, Net] = {}


class Images(nn.Module):
    """stem -> what `middle` says -> head."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor], head_in: int = 16, **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(head_in, 4, 1)
        self.middle = middle
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self, self.stem(x).relu()))


def images(name: str, middle: Callable[[Any, Tensor], Tensor], head_in: int = 16, **modules: Any) -> None:
    def make() -> tuple[nn.Module, Any, Any]:
        made = {k: m() for k, m in modules.items()}
        return Images(middle, head_in, **made), torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 8)

    NETS[name] = make


images("view", lambda m, y: y * m.gate(y.mean((2, 3))).view(-1, 16, 1, 1).sigmoid(), gate=lambda: nn.Linear(16, 16))
images("view_of_a_product", lambda m, y: y.reshape(y.size(0), 16 * y.size(2), -1).view(y.size(0), 16, y.size(2), -1))
images("view_pairs", lambda m, y: y.view(y.size(0), 8, 2, *y.shape[2:]).amax(2), head_in=8)
images("unflatten", lambda m, y: y.unflatten(1, (4, 4)).flatten(1, 2))
images("split_list", lambda m, y: torch.cat([p * (i + 1) for i, p in enumerate(y.split([6, 10], 1))], 1))
images("split_size", lambda m, y: torch.cat([p * (i + 1) for i, p in enumerate(y.split(8, dim=1))], 1))
images("split_keyword", lambda m, y: sum(torch.split(y, split_size_or_sections=8, dim=1)), head_in=8)
images("tensor_split", lambda m, y: torch.cat([p * (i + 1) for i, p in enumerate(y.tensor_split((4, 10), 1))], 1))
images("slices", lambda m, y: y[:, :8] - y[:, 8:], head_in=8)
images("negative_slices", lambda m, y: y[:, :-8] - y[:, -8:], head_in=8)
images("ellipsis", lambda m, y: y[..., :6, :, :].tanh().repeat(1, 2, 1, 1) + y[..., 4:, :, :], head_in=12)
images("narrow", lambda m, y: torch.cat([y.narrow(1, 0, 6), 2 * y.narrow(1, 6, 10)], 1))
images("select", lambda m, y: y * y.select(1, 5).unsqueeze(1).sigmoid())
images("one_index", lambda m, y: y * y[:, 5:6].sigmoid() + y[:, 11, None].tanh())
images("roll", lambda m, y: y + y.roll(8, 1))
images("expand", lambda m, y: y * m.scale(y.mean((1, 2, 3))[:, None]).view(-1, 16, 1, 1).expand(-1, 16, 1, 1),
       scale=lambda: nn.Linear(1, 16))  # fmt: skip
images("grouped", lambda m, y: F.conv2d(y, m.taps.weight, None, 1, 1, 1, 16),
       taps=lambda: nn.Conv2d(16, 16, 3, groups=16))  # fmt: skip
images("layer_norm", lambda m, y: F.layer_norm(y.movedim(1, -1), (16,), m.norm.weight, m.norm.bias).movedim(-1, 1),
       norm=lambda: nn.LayerNorm(16))  # fmt: skip
images("group_norm", lambda m, y: F.group_norm(y, 16, m.norm.weight, m.norm.bias), norm=lambda: nn.GroupNorm(16, 16))
images("zeros", lambda m, y: torch.zeros(y.shape[0], 16, *y.shape[2:]) + y.tanh())
images("ones", lambda m, y: y * torch.ones((1, 16, 1, 1)) + y.new_full((16, 1, 1), 0.5))
images("shuffle", lambda m, y: y.view(y.shape[0], 4, 4, y.shape[2], y.shape[3]).transpose(1, 2).reshape(
    y.shape[0], 16, y.shape[2], y.shape[3]))  # fmt: skip
images("in_place", lambda m, y: y.clone().view(-1, 16, y.shape[2], y.shape[3]).mul_(2).add_(1).relu_())
images("written_slice", lambda m, y: _written(y))
images("half_of_the_image", lambda m, y: y[:, :8, : y.shape[2] // 2] + y[:, 8:, : y.shape[2] // 2], head_in=8)


def _written(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :8] = y[:, :8] * 2 + y[:, 8:]
    return y


class Attention(nn.Module):
    """Heads and features as literals, a temperature from the shape."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(6, 24), nn.Linear(24, 96), nn.Linear(32, 5)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.embed(x)).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, 32))


NETS["attention"] = lambda: (Attention(False), torch.randn(2, 5, 6), torch.randn(3, 7, 6))
NETS["fused_attention"] = lambda: (Attention(True), torch.randn(2, 5, 6), torch.randn(3, 7, 6))


class Block(nn.Module):
    """A literal in a module that is used inside others."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.dropout = dropout

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        y = self.a(x).relu()
        y = F.dropout(y.view(-1, 12), self.dropout, self.training)
        y = self.b(y).view_as(x) * scale
        return x + y if shift is None else x + y + shift


class Answer(NamedTuple):
    first: Tensor
    rest: list[Tensor]


@dataclasses.dataclass
class Report:
    answer: Answer
    named: dict[str, Tensor]


class Outer(nn.Module):
    """One block shared by two paths and called thrice, another with keyword arguments; nested outputs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.block = Block(dropout)
        self.again = self.block
        self.other = Block(dropout)

    def forward(self, x: Tensor) -> Report:
        y = self.stem(x)
        for block in (self.block, self.again, self.block):
            y = block(y, 0.5)
        z = self.other(y, shift=y.tanh())
        return Report(Answer(self.head(z), [self.head(y)]), {"z": self.head(z - y)})


NETS["nested_and_shared"] = lambda: (Outer(), torch.randn(2, 4), torch.randn(5, 4))
