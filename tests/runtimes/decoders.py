"""A small decoder as Llama is built, with a cache of keys and values as plain tuples, and greedy texts of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 23
Cache = tuple[tuple[Tensor, Tensor], ...]


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angles = places[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before = 0 if past is None else past[0].shape[2]
        places = torch.arange(before, before + x.shape[1])
        h = self.norm1(x)
        made = (layer(h).reshape(x.shape[0], x.shape[1], -1, self.head) for layer in (self.q, self.k, self.v))
        q, k, v = (heads.transpose(1, 2) for heads in made)
        q, k = rotated(q, places), rotated(k, places)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        hidden = torch.arange(k.shape[2])[None, :] > places[:, None]
        scores = (q @ k.transpose(2, 3)) * self.head**-0.5
        weights = scores.masked_fill(hidden, -1e9).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)), (k, v)


class Decoder(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, hidden: int = 24, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm, self.out = Norm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past_key_values: Cache | None = None) -> dict[str, object]:
        x, cache = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            x, both = layer(x, None if past_key_values is None else past_key_values[i])
            cache.append(both)
        return {"logits": self.out(self.norm(x)), "past_key_values": tuple(cache)}


def decoder(layers: int = 1, seed: int = 0) -> Decoder:
    """One whose next tokens differ from one another."""
    torch.manual_seed(seed)
    model = Decoder(layers=layers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4 if p.ndim > 1 else torch.rand_like(p) + 0.5)
    return model


def cache_of(model: Decoder, batch: int, length: int) -> Cache:
    """Keys and values of the sizes that the model has, pruned ones too."""
    shapes = [(layer.k.out_features // layer.head, layer.head) for layer in model.layers]  # type: ignore[union-attr, operator]
    return tuple((torch.randn(batch, h, length, d), torch.randn(batch, h, length, d)) for h, d in shapes)


def greedy(model: nn.Module, ids: Tensor, steps: int) -> list[list[int]]:
    """The tokens that follow, all texts so far read anew for each."""
    for _ in range(steps):
        with torch.no_grad():
            following = model(ids)["logits"][:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    return ids[:, -steps:].tolist()
