"""Blocks of random networks that work on token sequences and vectors, and those that lead from one form to another."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .random_blocks import Block, Rng, activation, literal, pick, width


class LinearUnit(Block):
    def __init__(self, rng: Rng, inputs: int, vector: bool, outputs: int | None = None) -> None:
        super().__init__()
        o = outputs or width(rng)
        self.linear = nn.Linear(inputs, o, bias=bool(rng.random() < 0.7))
        norm = pick(rng, ["none", "none", "none", "none", "layer", "rms", "batch", "batch"])
        self.vector = vector
        if norm == "layer":
            self.norm: nn.Module = nn.LayerNorm(o)
        elif norm == "rms":
            self.norm = nn.RMSNorm(o)
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(o)
        else:
            self.norm = nn.Identity()
        self.statistics = norm in ("layer", "rms")
        self.act = pick(rng, [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Identity()]) if not vector else activation(rng, o)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if isinstance(self.norm, nn.BatchNorm1d) and not self.vector:
            y = self.norm(y.flatten(0, 1)).reshape_as(y)
        else:
            y = self.norm(y)
        return self.act(y)


class FeedForward(Block):
    """A residual block with a hidden layer: plain or gated, fused or not, perhaps with a norm in front."""

    def __init__(self, rng: Rng, channels: int) -> None:
        super().__init__()
        self.how = pick(rng, ["plain", "separate", "chunk", "split", "slice", "literal"])
        self.hidden = width(rng)
        self.literal = literal(self.hidden)
        self.norm = pick(rng, [nn.Identity(), nn.Identity(), nn.LayerNorm(channels), nn.RMSNorm(channels)])
        self.statistics = not isinstance(self.norm, nn.Identity)
        fused = self.how in ("chunk", "split", "slice", "literal")
        self.up = nn.Linear(channels, self.hidden * (2 if fused else 1))
        self.gate = nn.Linear(channels, self.hidden, bias=False)
        self.down = nn.Linear(self.hidden, channels)
        self.scale = nn.Parameter(torch.ones(channels)) if rng.random() < 0.3 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        if self.how == "plain":
            y = F.gelu(y)
        elif self.how == "separate":
            y = y * F.silu(self.gate(self.norm(x)))
        elif self.how == "chunk":
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        elif self.how == "split":
            value, gate = torch.split(y, self.hidden, dim=-1)
            y = value * F.gelu(gate)
        elif self.how == "slice":
            half = y.shape[-1] // 2
            y = torch.tanh(y[..., :half]) * y[..., half:]
        else:
            y = y[..., : self.literal()] * y[..., self.literal() :].sigmoid()
        y = self.down(y)
        return x + (y if self.scale is None else self.scale * y)


class Attention(Block):
    """Self-attention of many layouts, with its residual connection or without."""

    def __init__(self, rng: Rng, channels: int, length: int) -> None:
        super().__init__()
        self.heads, self.features = pick(rng, [1, 2, 3, 4]), pick(rng, [2, 3, 4, 6])
        self.groups = self.heads
        self.layout = pick(rng, [
            "part_head_feature", "head_part_feature", "head_feature_part", "chunk", "separate", "grouped", "literal",
        ])  # fmt: skip
        if self.layout == "grouped":
            self.heads, self.groups = pick(rng, [(4, 2), (4, 1), (6, 3), (3, 1)])
        self.score = pick(rng, ["fused", "fused", "shape", "attribute", "bias", "cosine", "causal"])
        self.scale = self.features**-0.5
        self.literals = literal((self.heads, self.features))
        wide, narrow = self.heads * self.features, self.groups * self.features
        self.qkv = nn.Linear(channels, 3 * wide)
        self.query, self.key = nn.Linear(channels, wide), nn.Linear(channels, narrow, bias=False)
        self.value = nn.Linear(channels, narrow)
        self.bias = nn.Parameter(torch.randn(self.heads, length, length))
        self.out = nn.Linear(wide, channels)
        self.norm = nn.LayerNorm(channels) if rng.random() < 0.3 else nn.Identity()
        self.residual = bool(rng.random() < 0.7)
        self.statistics = isinstance(self.norm, nn.LayerNorm)
        self.temperature = True

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        h, d = self.heads, self.features
        if self.layout == "part_head_feature":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "head_part_feature":
            q, k, v = self.qkv(x).view(b, n, h, 3 * d).transpose(1, 2).split(d, dim=-1)
        elif self.layout == "head_feature_part":
            q, k, v = self.qkv(x).view(b, n, h, d, 3).transpose(1, 2).unbind(-1)
        elif self.layout == "chunk":
            q, k, v = (t.view(b, n, h, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        else:
            if self.layout == "literal":
                h, d = self.literals()
            q = self.query(x).view(b, n, h, d).transpose(1, 2)
            k = self.key(x).view(b, n, self.groups, d).transpose(1, 2)
            v = self.value(x).view(b, n, self.groups, d).transpose(1, 2)
            if self.groups != self.heads:
                k = k.repeat_interleave(self.heads // self.groups, 1)
                v = v[:, :, None].expand(-1, -1, self.heads // self.groups, -1, -1).flatten(1, 2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.project(self.norm(x))
        if self.score == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            if self.score == "cosine":
                scores = F.normalize(q, dim=-1, eps=1e-3) @ F.normalize(k, dim=-1, eps=1e-3).mT
            elif self.score == "shape":
                scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            else:
                scores = (q * self.scale) @ k.transpose(-2, -1)
            if self.score == "bias":
                scores = scores + self.bias
            if self.score == "causal":
                scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
            mixed = torch.softmax(scores, -1) @ v
        y = self.out(mixed.transpose(1, 2).reshape(b, n, -1))
        return x + y if self.residual else y


class AttentionModule(Block):
    def __init__(self, rng: Rng, channels: int) -> None:
        super().__init__()
        self.heads = pick(rng, [2, 3])
        inner = self.heads * pick(rng, [2, 4])
        self.embed, self.out = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.attention = nn.MultiheadAttention(inner, self.heads, batch_first=True)
        self.temperature = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return x + self.out(self.attention(y, y, y, need_weights=False)[0])


class RecurrentUnit(Block):
    def __init__(self, rng: Rng, channels: int) -> None:
        super().__init__()
        both = bool(rng.random() < 0.4)
        kind = pick(rng, [nn.LSTM, nn.GRU, nn.RNN])
        self.network = kind(channels, width(rng, low=4, high=10), batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


class TokenExtras(Block):
    """Positions, an extra token, mixing along the tokens, shifted and dropped rows."""

    def __init__(self, rng: Rng, channels: int, length: int) -> None:
        super().__init__()
        self.how = pick(rng, ["position", "token", "mix", "roll", "rows", "table"])
        self.position = nn.Parameter(0.5 * torch.randn(1, length, channels))
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.mix = nn.Linear(length, length)
        self.table = nn.Embedding(length + 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "position":
            return x + self.position
        if self.how == "token":
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.how == "mix":
            return self.mix(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "roll":
            return x.roll(1, 1)
        if self.how == "rows":
            y = x.clone()
            y[:, 0] = self.token[0, 0]
            return y
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class ImageToTokens(Block):
    def __init__(self, rng: Rng) -> None:
        super().__init__()
        self.how = pick(rng, ["flatten", "permute", "view"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(2).transpose(1, 2)
        if self.how == "permute":
            return x.permute(0, 2, 3, 1).flatten(1, 2)
        b, c, h, w = x.shape
        return x.view(b, c, h * w).permute(0, 2, 1)


class TokensToImage(Block):
    def __init__(self, rng: Rng, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.how = pick(rng, ["rest", "shape", "attribute", "literal"])
        self.height, self.width = size
        self.channels = channels
        self.literal = literal(channels)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        if self.how == "rest":
            return x.transpose(1, 2).reshape(b, -1, self.height, self.width)
        if self.how == "shape":
            return x.view(b, self.height, self.width, c).permute(0, 3, 1, 2)
        count = self.channels if self.how == "attribute" else self.literal()
        return x.mT.reshape(b, count, self.height, self.width)


class ToVector(Block):
    def __init__(self, rng: Rng, value: Tensor) -> None:
        super().__init__()
        kinds = ["mean", "largest", "pool"] if value.dim() == 4 else ["mean", "largest", "first", "last"]
        if value[0].numel() <= 400:
            kinds += ["flatten", "flatten_shape", "flatten_literal", "channels_last"]
        self.how = pick(rng, kinds)
        self.literal = literal(value[0].numel())
        self.flat = "flatten" in self.how or self.how == "channels_last"
        self.linear = nn.Linear(value[0].numel(), width(rng)) if self.flat else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, x.dim())) if x.dim() == 4 else (1,)
        if self.how == "mean":
            return x.mean(axes)
        if self.how == "largest":
            return x.amax(axes)
        if self.how == "pool":
            b, c, _, _ = x.shape
            return F.adaptive_avg_pool2d(x, 1).view(b, c)
        if self.how == "first":
            return x[:, 0]
        if self.how == "last":
            return x[:, -1, :]
        if self.how == "flatten":
            y = torch.flatten(x, 1)
        elif self.how == "flatten_shape":
            y = x.reshape(x.shape[0], x.shape[1] * (x.numel() // (x.shape[0] * x.shape[1])))
        elif self.how == "flatten_literal":
            y = x.reshape(-1, self.literal())
        else:
            y = x.movedim(1, -1).reshape(x.size(0), -1)
        return self.linear(y)


class VectorToImage(Block):
    def __init__(self, rng: Rng, inputs: int) -> None:
        super().__init__()
        self.channels = width(rng, low=4, high=12)
        self.how = pick(rng, ["rest", "attribute", "literal", "one_pixel"])
        self.literal = literal(self.channels)
        self.linear = nn.Linear(inputs, self.channels * 16)
        self.grow = nn.ConvTranspose2d(inputs, self.channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "one_pixel":
            return self.grow(x[..., None, None])
        y = self.linear(x)
        if self.how == "rest":
            return y.view(x.shape[0], -1, 4, 4)
        return y.view(-1, self.channels if self.how == "attribute" else self.literal(), 4, 4)


class VectorUnit(Block):
    """Highway, bilinear and einsum layers, bare matrices."""

    def __init__(self, rng: Rng, channels: int) -> None:
        super().__init__()
        outputs = width(rng)
        self.how = pick(rng, ["highway", "bilinear", "einsum", "matmul"])
        self.carry, self.change = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.bilinear = nn.Bilinear(channels, channels, outputs)
        self.weight = nn.Parameter(torch.randn(channels, outputs) / math.sqrt(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "highway":
            gate = torch.sigmoid(self.carry(x))
            return gate * self.change(x).tanh() + (1 - gate) * x
        if self.how == "bilinear":
            return self.bilinear(x, x.tanh())
        if self.how == "einsum":
            return torch.einsum("bi,io->bo", x, self.weight)
        return (x @ self.weight).relu()
