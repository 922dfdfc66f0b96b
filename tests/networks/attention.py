"""Attention written out: how heads are laid out, shared, masked, positioned, scaled."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import network, tokens, variant

WIDTH = 10


class SingleHead(nn.Module):
    """No heads: queries and keys share one width, values have another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.query, self.key, self.value = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.how == "matmul":
            scores = q @ k.transpose(-2, -1)
        elif self.how == "bmm":
            scores = torch.bmm(q, k.mT) / math.sqrt(12)
        elif self.how == "einsum":
            scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.size(-1))
        else:
            return self.out(F.scaled_dot_product_attention(q, k, v))
        return self.out(scores.softmax(-1) @ v)


for _how in ("matmul", "bmm", "einsum", "fused"):
    variant(f"single_head_{_how}", lambda how=_how: SingleHead(how), tokens(), temperature=True)  # type: ignore[misc]


class FusedProjection(nn.Module):
    """One Linear makes queries, keys and values of all heads, in some layout."""

    def __init__(self, layout: str, heads: int = 4, features: int = 6) -> None:
        super().__init__()
        self.layout = layout
        self.num_heads = heads
        self.head_dim = features
        self.embed = nn.Linear(WIDTH, 14)
        self.qkv = nn.Linear(14, 3 * heads * features)
        self.out = nn.Linear(heads * features, 14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        b, n, _ = y.shape
        h, d = self.num_heads, self.head_dim
        fused = self.qkv(y)
        if self.layout == "part_head_feature":
            q, k, v = fused.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "part_head_rest":
            q, k, v = fused.reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        elif self.layout == "head_part_feature":
            q, k, v = fused.view(b, n, h, 3, d).transpose(1, 2).unbind(3)
        elif self.layout == "head_feature_part":
            q, k, v = fused.reshape(b, n, h, d, 3).movedim(4, 0).transpose(2, 3).unbind(0)
        elif self.layout == "head_chunks":  # GPT-NeoX
            q, k, v = fused.view(b, n, h, 3 * d).transpose(1, 2).chunk(3, dim=-1)
        elif self.layout == "literal":
            q, k, v = fused.reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "width_over_heads":
            width = fused.shape[-1] // 3
            q, k, v = (t.view(b, n, h, width // h).transpose(1, 2) for t in fused.split(width, dim=2))
        else:  # chunked, then heads
            q, k, v = (t.unflatten(-1, (h, d)).transpose(1, 2) for t in fused.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(y + self.out(mixed.reshape(b, n, -1)))


for _layout in (
    "part_head_feature", "part_head_rest", "head_part_feature", "head_feature_part", "head_chunks", "literal",
    "width_over_heads", "chunked",
):
    variant(f"fused_projection_{_layout}", lambda layout=_layout: FusedProjection(layout),  # type: ignore[misc]
            tokens(), temperature=True)


class SeparateProjections(nn.Module):
    """Three Linear layers; softmax by hand with the temperature from a literal, an attribute, a shape or a buffer."""

    temperature: Tensor

    def __init__(self, scale: str, heads: int = 3, features: int = 8) -> None:
        super().__init__()
        self.scale_from = scale
        self.heads = heads
        self.features = features
        self.scale = features**-0.5
        width = heads * features
        self.register_buffer("temperature", torch.tensor(features**-0.5))
        self.query, self.key = nn.Linear(WIDTH, width), nn.Linear(WIDTH, width, bias=False)
        self.value = nn.Linear(WIDTH, width)
        self.out = nn.Linear(width, 7)

    def split(self, y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], self.heads, self.features).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        if self.scale_from == "literal":
            scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        elif self.scale_from == "attribute":
            scores = (q @ k.transpose(-2, -1)) * self.scale
        elif self.scale_from == "features":
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.features)
        elif self.scale_from == "shape":
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        else:
            scores = (q @ k.transpose(-2, -1)) * self.temperature
        mixed = scores.softmax(dim=-1) @ v
        b, h, n, d = mixed.shape
        return self.out(mixed.transpose(1, 2).contiguous().view(b, n, h * d))


for _scale in ("literal", "attribute", "features", "shape", "buffer"):
    variant(f"separate_projections_scale_{_scale}", lambda scale=_scale: SeparateProjections(scale),  # type: ignore[misc]
            tokens(), temperature=True)


@network(tokens(), temperature=True)
class LiteralHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).view(-1, 6, 4, 6).transpose(1, 2)
        k = self.key(x).view(-1, 6, 4, 6).transpose(1, 2)
        v = self.value(x).view(-1, 6, 4, 6).transpose(1, 2)
        weights = torch.softmax(q @ k.mT / 6**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(-1, 6, 24))


class GroupedQueries(nn.Module):
    """Fewer key and value heads than query heads, or only one."""

    def __init__(self, how: str, heads: int = 6, groups: int = 3, features: int = 4) -> None:
        super().__init__()
        self.how = how
        self.heads, self.groups, self.features = heads, groups, features
        self.query = nn.Linear(WIDTH, heads * features, bias=False)
        self.key = nn.Linear(WIDTH, groups * features, bias=False)
        self.value = nn.Linear(WIDTH, groups * features, bias=False)
        self.out = nn.Linear(heads * features, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.query(x).view(b, n, self.heads, self.features).transpose(1, 2)
        k = self.key(x).view(b, n, self.groups, self.features).transpose(1, 2)
        v = self.value(x).view(b, n, self.groups, self.features).transpose(1, 2)
        times = self.heads // self.groups
        if self.how == "interleave":
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        elif self.how == "expand":
            k = k[:, :, None].expand(b, self.groups, times, n, self.features).reshape(b, self.heads, n, self.features)
            v = v[:, :, None].expand(b, self.groups, times, n, self.features).reshape(b, self.heads, n, self.features)
        elif self.how == "grouped_view":
            q = q.reshape(b, self.groups, times, n, self.features)
            scores = (q @ k.unsqueeze(2).mT) * 0.5
            mixed = scores.softmax(-1) @ v.unsqueeze(2)
            return self.out(mixed.flatten(1, 2).transpose(1, 2).flatten(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, n, self.heads * self.features))


for _how in ("interleave", "expand", "grouped_view"):
    variant(f"grouped_queries_{_how}", lambda how=_how: GroupedQueries(how), tokens(),  # type: ignore[misc]
            temperature=True)
variant("multi_query", lambda: GroupedQueries("broadcast", groups=1), tokens(), temperature=True)


class Rotary(nn.Module):
    """Rotary positions by halves, by neighbouring pairs, or as complex numbers."""

    frequencies: Tensor

    def __init__(self, how: str, heads: int = 3, features: int = 8) -> None:
        super().__init__()
        self.how = how
        self.heads, self.features = heads, features
        self.register_buffer("frequencies", 10.0 ** (-torch.arange(0, features, 2).float() / features))
        self.qkv = nn.Linear(WIDTH, 3 * heads * features)
        self.out = nn.Linear(heads * features, 5)

    def rotate(self, t: Tensor) -> Tensor:
        angles = torch.arange(t.shape[2], device=t.device, dtype=t.dtype)[:, None] * self.frequencies
        if self.how == "complex":
            pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)
        if self.how == "pairs":
            cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
            turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
            half = t.shape[-1] // 2
            turned = torch.cat([-t[..., half:], t[..., :half]], dim=-1)
        return t * cos + turned * sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.features).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


for _how in ("halves", "pairs", "complex"):
    variant(f"rotary_{_how}", lambda how=_how: Rotary(how), tokens(), temperature=True)  # type: ignore[misc]


class PositionedAttention(nn.Module):
    """Position biases, masks, normed queries, extra tokens and mixed heads around one attention."""

    index: Tensor
    slopes: Tensor

    def __init__(self, how: str, heads: int = 4, features: int = 5, length: int = 6) -> None:
        super().__init__()
        self.how = how
        self.num_heads, self.head_dim = heads, features
        self.qkv = nn.Linear(WIDTH, 3 * heads * features)
        self.table = nn.Parameter(0.5 * torch.randn(2 * length - 1, heads))
        self.bias = nn.Parameter(0.5 * torch.randn(1, heads, length, length))
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 0.4))
        self.sink = nn.Parameter(torch.randn(heads))
        self.talk = nn.Linear(heads, heads)
        self.query_norm, self.key_norm = nn.LayerNorm(features), nn.LayerNorm(features)
        self.out = nn.Linear(heads * features, 5)
        steps = torch.arange(length)
        self.register_buffer("index", (steps[:, None] - steps[None] + length - 1).flatten(), persistent=False)
        self.register_buffer("slopes", 0.5 ** torch.arange(1, heads + 1).float())

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.how == "normed":
            q, k = self.query_norm(q), self.key_norm(k)
        if self.how == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-2, -1) * 0.45
        if self.how == "bias_table":
            scores = scores + self.table[self.index].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        elif self.how == "bias_embedding":
            scores = scores + F.embedding(self.index.view(n, n), self.table).permute(2, 0, 1)
        elif self.how == "bias_parameter":
            scores = scores + self.bias
        elif self.how == "slopes":
            distance = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs().to(x.dtype)
            scores = scores - self.slopes.view(1, -1, 1, 1) * distance
        elif self.how == "causal":
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        elif self.how == "cosine":
            scores = scores * self.scale.exp()
        elif self.how == "sinks":
            sink = self.sink.view(1, -1, 1, 1).expand(b, -1, n, 1)
            return self.finish(torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v)
        weights = scores.softmax(-1)
        if self.how == "talking":
            weights = self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.finish(weights @ v)

    def finish(self, mixed: Tensor) -> Tensor:
        return self.out(mixed.transpose(1, 2).flatten(2))


for _how in (
    "bias_table", "bias_embedding", "bias_parameter", "slopes", "causal", "cosine", "sinks", "talking",
):
    variant(f"attention_{_how}", lambda how=_how: PositionedAttention(how), tokens(),  # type: ignore[misc]
            temperature=True)
variant("attention_normed", lambda: PositionedAttention("normed"), tokens(), statistics=True, temperature=True)


@network(lambda: (torch.randn(2, 5, 10), torch.randn(2, 7, 8)), temperature=True)
class CrossAttention(nn.Module):
    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(10, 12)
        self.query, self.key_value = nn.Linear(12, 18), nn.Linear(8, 36)
        self.out = nn.Linear(18, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.embed(x)
        q = self.query(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.key_value(context).chunk(2, -1))
        return self.head(y + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)))


@network(tokens(), statistics=True)
class LinearAttention(nn.Module):
    """Softmax of queries over the features and of keys over the positions, then two products without a score map."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv = nn.Linear(WIDTH, 36)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-2), v)
        return self.out(torch.einsum("bhnd,bhde->bhne", q.softmax(-1), context).transpose(1, 2).flatten(2))


@network(tokens(8, 10), statistics=True)
class ChannelAttention(nn.Module):
    """XCiT: features attend to features, normalised over the tokens; the softmax runs over features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.qkv = nn.Linear(WIDTH, 48)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, 8).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, 16))
