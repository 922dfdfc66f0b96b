"""Small transformers written the way the well-known ones are, for tests that must run without their packages.

The code follows how Hugging Face's BERT, Llama, T5 and Whisper write their sizes and reshapes; the widths are small and
all different where the architecture allows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = 40


class BertAttention(nn.Module):
    """Separate projections; all_head_size next to num_attention_heads and attention_head_size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.attention_head_size = int(width / heads)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(width, self.all_head_size) for _ in range(3))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.transpose_for_scores(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        context = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        context = context.view((*context.size()[:-2], self.all_head_size))
        out: Tensor = self.norm(self.dense(context) + x)
        return out


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, heads)
        self.intermediate, self.output = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        out: Tensor = self.norm(self.output(F.gelu(self.intermediate(x))) + x)
        return out


class Bert(nn.Module):
    """Post-norm encoder over summed word and position embeddings, with a classifier on the first token."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 20, layers: int = 2) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(WORDS, width), nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(layers))
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(16).expand(1, -1), persistent=False)
        self.position_ids: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.position(self.position_ids[:, : ids.size(1)]))
        for layer in self.layer:
            x = layer(x)
        out: Tensor = self.classifier(x[:, 0])
        return out


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Rotary(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 100.0 ** (torch.arange(0, features, 2).float() / features))
        self.inv_freq: Tensor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, length, features = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, features)
    return x.reshape(batch, heads * times, length, features)


class LlamaAttention(nn.Module):
    """Grouped queries and rotary positions."""

    def __init__(self, width: int, heads: int, kv_heads: int, features: int) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = features, heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * features, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * features, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * features, bias=False)
        self.o_proj = nn.Linear(heads * features, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.num_key_value_groups), repeat_kv(v, self.num_key_value_groups)
        weights = torch.matmul(q, k.transpose(2, 3)) * self.scaling
        weights = weights + torch.full_like(weights, float("-inf")).triu(1)
        mixed = torch.matmul(F.softmax(weights, dim=-1), v).transpose(1, 2).contiguous()
        out: Tensor = self.o_proj(mixed.reshape(*x.shape[:-1], -1).contiguous())
        return out


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, features: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(width, heads, kv_heads, features)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.before, self.between = RootMeanSquare(width), RootMeanSquare(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.before(x), cos, sin)
        y = self.between(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Decoder with grouped queries, rotary positions, gated MLPs and RMS norms."""

    def __init__(self, width: int = 24, heads: int = 8, kv_heads: int = 4, features: int = 8, hidden: int = 20) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, width)
        self.rotary = Rotary(features)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, kv_heads, features, hidden) for _ in range(2))
        self.norm, self.lm_head = RootMeanSquare(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.rotary(torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.lm_head(self.norm(x))
        return out


class T5Attention(nn.Module):
    """Relative position bias from a table of buckets; inner_dim = n_heads * d_kv; no temperature."""

    def __init__(self, width: int, heads: int, features: int, biased: bool) -> None:
        super().__init__()
        self.n_heads, self.key_value_proj_dim = heads, features
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        self.q, self.k, self.v = (nn.Linear(width, self.inner_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner_dim, width, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(8, heads)

    def compute_bias(self, query: int, key: int) -> Tensor:
        distance = torch.arange(key)[None, :] - torch.arange(query)[:, None]
        values: Tensor = self.relative_attention_bias(distance.clamp(-4, 3) + 4)
        return values.permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x: Tensor, other: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = x.shape[0]
        q = self.q(x).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        k = self.k(other).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        v = self.v(other).view(batch, -1, self.n_heads, self.key_value_proj_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        if bias is None:
            bias = self.compute_bias(x.shape[1], other.shape[1])
        mixed = torch.matmul(F.softmax(scores + bias, dim=-1), v).transpose(1, 2).contiguous()
        return self.o(mixed.view(batch, -1, self.inner_dim)), bias


class T5Layer(nn.Module):
    def __init__(self, width: int, heads: int, features: int, hidden: int, crosses: bool, biased: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RootMeanSquare(width) for _ in range(3))
        self.attention = T5Attention(width, heads, features, biased)
        self.cross = T5Attention(width, heads, features, biased) if crosses else None
        self.wi, self.wo = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None, biases: list[Tensor | None]) -> Tensor:
        normed = self.norms[0](x)
        made, biases[0] = self.attention(normed, normed, biases[0])
        x = x + made
        if self.cross is not None and memory is not None:
            made, biases[1] = self.cross(self.norms[1](x), memory, biases[1])
            x = x + made
        return x + self.wo(F.relu(self.wi(self.norms[2](x))))


class T5(nn.Module):
    """Encoder and decoder over one table of embeddings; only the first layers hold position tables."""

    def __init__(self, width: int = 24, heads: int = 4, features: int = 5, hidden: int = 20) -> None:
        super().__init__()
        self.shared = nn.Embedding(WORDS, width)
        self.encoder = nn.ModuleList(T5Layer(width, heads, features, hidden, False, i == 0) for i in range(2))
        self.decoder = nn.ModuleList(T5Layer(width, heads, features, hidden, True, i == 0) for i in range(2))
        self.lm_head = nn.Linear(width, WORDS, bias=False)

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        x, biases = self.shared(ids), [None, None]
        for layer in self.encoder:
            x = layer(x, None, biases)
        y, biases = self.shared(decoder_ids), [None, None]
        for layer in self.decoder:
            y = layer(y, x, biases)
        out: Tensor = self.lm_head(y)
        return out


class WhisperAttention(nn.Module):
    """The scale is applied to the query projection; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor, causal: bool) -> Tensor:
        batch, length, _ = x.shape
        q = (self.q_proj(x) * self.scaling).view(batch, length, -1, self.head_dim).transpose(1, 2).contiguous()
        k = self.k_proj(other).view(batch, other.shape[1], -1, self.head_dim).transpose(1, 2).contiguous()
        v = self.v_proj(other).view(batch, other.shape[1], -1, self.head_dim).transpose(1, 2).contiguous()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).contiguous().reshape(batch, length, -1))
        return out


class WhisperLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, crosses: bool) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.encoder_attn = WhisperAttention(width, heads) if crosses else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.self_attn(y, y, memory is not None)
        if self.encoder_attn is not None and memory is not None:
            x = x + self.encoder_attn(self.norms[1](x), memory, False)
        return x + self.fc2(F.gelu(self.fc1(self.norms[2](x))))


class Whisper(nn.Module):
    """Sound through two convolutions into an encoder, words into a decoder whose table is also its head."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 20) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(10, width, 3, padding=1), nn.Conv1d(width, width, 3, 2, 1)
        self.sounds, self.positions = nn.Embedding(8, width), nn.Embedding(12, width)
        self.words, self.norm = nn.Embedding(WORDS, width), nn.LayerNorm(width)
        self.encoder = nn.ModuleList(WhisperLayer(width, heads, hidden, False) for _ in range(2))
        self.decoder = nn.ModuleList(WhisperLayer(width, heads, hidden, True) for _ in range(2))
        self.proj_out = nn.Linear(width, WORDS, bias=False)
        self.proj_out.weight = self.words.weight

    def forward(self, sound: Tensor, ids: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(sound)))).permute(0, 2, 1)
        x = x + self.sounds(torch.arange(x.shape[1]))
        for layer in self.encoder:
            x = layer(x, None)
        y = self.words(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.decoder:
            y = layer(y, x)
        out: Tensor = self.proj_out(self.norm(y))
        return out


def words(length: int = 7) -> Tensor:
    """Word numbers (2, length), all below `WORDS`."""
    return torch.randint(1, WORDS, (2, length), generator=torch.Generator().manual_seed(0))


class ConvSiLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class C2f(nn.Module):
    """Two halves, one of them through a chain whose every step is kept."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = ConvSiLU(inputs, 2 * self.c), ConvSiLU(3 * self.c, outputs)
        self.m = ConvSiLU(self.c, self.c, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.append(y[-1] + self.m(y[-1]))
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class Yolo(nn.Module):
    """Two scales, an upsampled path, and heads whose boxes are expectations over a fixed number of bins."""

    def __init__(self, classes: int = 5, bins: int = 8) -> None:
        super().__init__()
        self.bins, self.no = bins, classes + 4 * bins
        self.stem, self.low = ConvSiLU(3, 8, 3, 2), C2f(8, 12)
        self.down, self.high = ConvSiLU(12, 16, 3, 2), C2f(16, 20)
        self.neck = C2f(32, 12)
        self.boxes = nn.ModuleList(
            nn.Sequential(ConvSiLU(c, 10, 3), nn.Conv2d(10, 4 * self.bins, 1)) for c in (12, 20)
        )
        self.scores = nn.ModuleList(nn.Sequential(ConvSiLU(c, 10, 3), nn.Conv2d(10, classes, 1)) for c in (12, 20))
        self.dfl = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(self.bins, dtype=torch.float).view(1, self.bins, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(self.stem(x))
        high = self.high(self.down(low))
        low = self.neck(torch.cat([low, F.interpolate(high, scale_factor=2.0)], 1))
        maps = [
            torch.cat([box(y), score(y)], 1) for y, box, score in zip((low, high), self.boxes, self.scores, strict=True)
        ]
        flat = torch.cat([y.view(x.shape[0], self.no, -1) for y in maps], 2)
        box, score = flat.split((4 * self.bins, self.no - 4 * self.bins), 1)
        b, _, anchors = box.shape
        sides = self.dfl(box.view(b, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(b, 4, anchors)
        return sides, score.sigmoid()
