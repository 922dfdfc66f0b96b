"""Networks of repeated layers, written the ways users write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int, out: int | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, out or channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + self.skip(x))


class Stages(nn.Module):
    """Stages of residual blocks; the first of the second stage changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(*(Residual(8) for _ in range(3)))
        self.stage2 = nn.Sequential(Residual(8, 12), Residual(12), Residual(12))
        self.norm, self.head = nn.GroupNorm(3, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stage2(self.stage1(torch.relu(self.stem(x))))).mean((2, 3)))


class Attributes(nn.Module):
    """Blocks that are no list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second, self.third = Residual(8), Residual(8), Residual(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(x=self.second(self.first(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, None]:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if cache is not None:
            cache[self.layer_idx] = k
        out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + mask, -1) @ v
        return self.o(out.transpose(1, 2).flatten(2)), None


class DecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.kind = config, config.layer_types[layer_idx]
        self.attention = Attention(config.width, layer_idx)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, 24), nn.Linear(24, config.width)

    def forward(self, hidden: Tensor, mask: Tensor, cache: list[Tensor] | None = None) -> tuple[Tensor, None]:
        hidden = hidden + self.attention(self.norm1(hidden), mask, cache)[0]
        return hidden + self.down(torch.tanh(self.up(self.norm2(hidden)))), None


class Decoder(nn.Module):
    """A language model with a configuration object, layer indices, and layers that return tuples."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        kinds = ["full", "sliding"] * layers
        self.config = SimpleNamespace(num_hidden_layers=layers, width=12, heads=layers, layer_types=kinds[:layers])
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(DecoderLayer(self.config, i) for i in range(layers))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        mask = torch.full((n, n), -1e4).triu(1)
        cache: list[Any] = [None] * self.config.num_hidden_layers
        hidden = self.embed(tokens)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = layer(hidden, mask if layer.kind == "full" else mask * 0.5, cache=cache)[0]
        return self.head(self.norm(hidden))


class Counted(Decoder):
    """Counts on the length of its list."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        mask = torch.zeros(tokens.shape[1], tokens.shape[1])
        for i in range(4):
            hidden = self.layers[i](hidden, mask)[0]
        return self.head(hidden)


class Needed(nn.Module):
    """Its layers cannot go: the code reads from inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * layer.conv1.weight.sum()
        return x


class Branches(nn.Module):
    """No block: pre-norm branches in the network's own forward, and streams that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)) for _ in range(2))
        self.wide = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.mix:
            x = x + branch(x)
        return torch.cat([self.wide(x), x], -1)


def networks() -> dict[str, tuple[nn.Module, Any, list[str]]]:
    """Name -> (model, example input, the layers that can go)."""
    torch.manual_seed(0)
    image, tokens = torch.randn(2, 3, 6, 6), torch.randint(0, 20, (2, 5))
    four = [f"layers.{i}" for i in range(4)]
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    made: dict[str, tuple[nn.Module, Any, list[str]]] = {
        "stages": (Stages(), image, [*(f"stage1.{i}" for i in range(3)), "stage2.1", "stage2.2"]),
        "attributes": (Attributes(), image, ["first", "second", "third"]),
        "decoder": (Decoder(), tokens, four),
        "counted": (Counted(), tokens, four),
        "needed": (Needed(), image, ["layers.0", "layers.1"]),
        "branches": (Branches(), torch.randn(2, 4, 6), []),
        "chain": (chain, torch.randn(3, 4), ["2", "4"]),
    }
    for model, _, _ in made.values():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
        model.eval()
    return made
