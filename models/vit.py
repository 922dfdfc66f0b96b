"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with its attention written out, for 8 x 8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._seeded import seeded


class Attention(nn.Module):
    """Multi-head self-attention over (batch, tokens, width), with one projection for queries, keys and values.

    The sizes are attributes that do not repeat each other's product, so heads and head features can each be cut alone.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * num_heads * self.head_dim)
        self.project = nn.Linear(num_heads * self.head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) * self.scale, dim=-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        out: Tensor = self.project(mixed)
        return out


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and around a residual."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + y


class TinyViT(nn.Module):
    """(batch, 1, 8, 8) -> (batch, classes) logits, from 16 patches of 2 x 2 pixels and a class token."""

    def __init__(
        self, width: int = 96, depth: int = 4, num_heads: int = 4, hidden: int = 192, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers = nn.Sequential(*(EncoderLayer(width, num_heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = self.layers(tokens + self.positions)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


def tiny_vit(
    width: int = 96,
    depth: int = 4,
    num_heads: int = 4,
    hidden: int = 192,
    classes: int = 10,
    *,
    batch: int = 1,
    seed: int = 0,
) -> tuple[TinyViT, Tensor]:
    """A vision transformer (about 0.3 M parameters) and an example input."""
    return seeded(lambda: TinyViT(width, depth, num_heads, hidden, classes), seed, batch)
