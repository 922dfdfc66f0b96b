"""Whole blocks of known vision and language networks, small."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, image, network, words


@network(image(3, 6), statistics=True)
class ConvNextBlock(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.depthwise = conv(width, width, 5, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.norm(self.depthwise(y).permute(0, 2, 3, 1))
        z = self.gamma * self.down(F.gelu(self.up(z)))
        return self.head((y + z.permute(0, 3, 1, 2)).mean([-2, -1]))


@network(image(3, 6), statistics=True)
class ConvNextV2Block(nn.Module):
    """With global response normalisation: a mean over the channels of each channel's length."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.stem, self.depthwise = conv(3, width), conv(width, width, groups=width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.gamma, self.beta = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(24))
        self.head = conv(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = F.gelu(self.up(self.depthwise(y).permute(0, 2, 3, 1)))
        length = z.norm(p=2, dim=(1, 2), keepdim=True)
        z = z + torch.addcmul(self.beta, self.gamma, z * (length / (length.mean(-1, keepdim=True) + 1e-6)))
        return self.head(y + self.down(z).permute(0, 3, 1, 2))


@network(image(3, 8), statistics=True, temperature=True)
class ShiftedWindows(nn.Module):
    """Swin: cyclic shift, window partition, attention with relative positions and mask, and the way back; merging."""

    mask: Tensor
    relative: Tensor

    def __init__(self, width: int = 12, heads: int = 3, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.window, self.shift, self.heads = window, shift, heads
        self.stem = conv(3, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(0.3 * torch.randn((2 * window - 1) ** 2, heads))
        self.reduce_norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 16, bias=False)
        self.head = nn.Linear(16, 4)
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offsets = (grid[:, :, None] - grid[:, None]) + window - 1
        self.register_buffer("relative", offsets[0] * (2 * window - 1) + offsets[1])
        region = torch.zeros(8, 8)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                region[rows, columns] = 3 * i + j
        parts = region.view(2, window, 2, window).permute(0, 2, 1, 3).reshape(4, -1)
        self.register_buffer("mask", (parts[:, None] != parts[:, :, None]).float() * -100.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = y.shape
        size = self.window
        z = torch.roll(self.norm(y), shifts=(-self.shift, -self.shift), dims=(1, 2))
        z = z.view(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)
        q, k, v = self.qkv(z).reshape(len(z), size * size, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * 0.5 @ k.transpose(-2, -1)
        bias = self.table[self.relative.view(-1)].view(size * size, size * size, -1).permute(2, 0, 1).contiguous()
        scores = (scores + bias).view(b, 4, self.heads, size * size, size * size) + self.mask[None, :, None]
        z = (scores.view(-1, self.heads, size * size, size * size).softmax(-1) @ v).transpose(1, 2).reshape(z.shape)
        z = self.out(z).view(b, h // size, w // size, size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        y = y + torch.roll(z, shifts=(self.shift, self.shift), dims=(1, 2))
        quarters = [y[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.head(self.reduce(self.reduce_norm(torch.cat(quarters, -1))).mean((1, 2)))


@network(image(3, 8), statistics=True, temperature=True)
class VisionTransformerBlock(nn.Module):
    """Patch embedding, class token, learned positions, one block, and the class token's head."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, 5, width))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), y), dim=1) + self.pos_embed
        b, n, c = y.shape
        qkv = self.qkv(self.norm1(y)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        y = y + self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        y = y + self.fc2(F.gelu(self.fc1(self.norm2(y))))
        return self.head(self.norm(y)[:, 0])


@network(words(), statistics=True, temperature=True)
class CausalLanguageModel(nn.Module):
    """GPT: fused projection split by an attribute, causal buffer, tied output."""

    causal: Tensor

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.wte, self.wpe = nn.Embedding(20, width), nn.Embedding(8, width)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("causal", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, index: Tensor) -> Tensor:
        b, t = index.size()
        y = self.wte(index) + self.wpe(torch.arange(t, device=index.device))
        q, k, v = self.attn(self.ln_1(y)).split(self.width, dim=2)
        q = q.view(b, t, self.heads, self.width // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, self.width // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, self.width // self.heads).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :t, :t] == 0, float("-inf"))
        y = y + self.proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, self.width))
        y = y + self.out(F.gelu(self.fc(self.ln_2(y)), approximate="tanh"))
        return F.linear(self.ln_f(y), self.wte.weight)


@network(words(), statistics=True, temperature=True)
class LlamaBlock(nn.Module):
    """RMS norms, rotary positions, grouped key and value heads, SwiGLU."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2, features: int = 4) -> None:
        super().__init__()
        self.heads, self.groups, self.features = heads, groups, features
        self.embed = nn.Embedding(20, width)
        self.input_norm, self.post_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, heads * features, bias=False)
        self.k_proj = nn.Linear(width, groups * features, bias=False)
        self.v_proj = nn.Linear(width, groups * features, bias=False)
        self.o_proj = nn.Linear(heads * features, width, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(width, 20, bias=False), nn.Linear(width, 20, bias=False)
        self.down_proj = nn.Linear(20, width, bias=False)
        self.lm_head = nn.Linear(width, 20, bias=False)

    def rotate(self, t: Tensor) -> Tensor:
        steps = torch.arange(t.shape[2], dtype=t.dtype, device=t.device)
        angles = torch.outer(steps, 0.1 ** torch.arange(2, dtype=t.dtype, device=t.device))
        angles = torch.cat((angles, angles), dim=-1)
        first, second = t[..., : t.shape[-1] // 2], t[..., t.shape[-1] // 2 :]
        return t * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def forward(self, index: Tensor) -> Tensor:
        y = self.embed(index)
        b, n, _ = y.shape
        z = self.input_norm(y)
        q = self.rotate(self.q_proj(z).view(b, n, -1, self.features).transpose(1, 2))
        k = self.rotate(self.k_proj(z).view(b, n, -1, self.features).transpose(1, 2))
        v = self.v_proj(z).view(b, n, -1, self.features).transpose(1, 2)
        times = self.heads // self.groups
        k = k[:, :, None, :, :].expand(b, k.shape[1], times, n, self.features).reshape(b, -1, n, self.features)
        v = v[:, :, None, :, :].expand(b, v.shape[1], times, n, self.features).reshape(b, -1, n, self.features)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()
        y = y + self.o_proj(z.reshape(b, n, -1))
        z = self.post_norm(y)
        return self.lm_head(y + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z)))


def _masked_words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 20, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@network(_masked_words, statistics=True, temperature=True)
class BertLayer(nn.Module):
    """Post-norm encoder with an additive mask and a pooler over the first token."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.attention_head_size = width // heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.words, self.positions = nn.Embedding(20, width, padding_idx=0), nn.Embedding(8, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.query, self.key, self.value = (nn.Linear(width, self.all_head_size) for _ in range(3))
        self.dense, self.attention_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 30), nn.Linear(30, width)
        self.output_norm = nn.LayerNorm(width)
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 2)

    def heads(self, y: Tensor) -> Tensor:
        shape = (*y.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return y.view(shape).permute(0, 2, 1, 3)

    def forward(self, index: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.words(index) + self.positions(torch.arange(index.shape[1])[None]))
        q, k, v = self.heads(self.query(y)), self.heads(self.key(y)), self.heads(self.value(y))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        scores = scores + (1.0 - mask[:, None, None, :].to(y.dtype)) * -1e4
        context = torch.matmul(nn.functional.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        context = context.view(context.shape[:-2] + torch.Size([self.all_head_size]))
        y = self.attention_norm(y + self.dense(context))
        y = self.output_norm(y + self.output(F.gelu(self.intermediate(y))))
        return self.classifier(torch.tanh(self.pooler(y[:, 0])))


@network(image(3, 6), temperature=True)
class LevitAttention(nn.Module):
    """Linear with BatchNorm, values wider than keys, biases per head by constant indices."""

    index: Tensor

    def __init__(self, heads: int = 3, key_dim: int = 4, ratio: int = 2) -> None:
        super().__init__()
        self.num_heads, self.key_dim = heads, key_dim
        self.val_dim = ratio * key_dim
        self.val_attn_dim = self.val_dim * heads
        self.stem = conv(3, 12)
        self.qkv = nn.Linear(12, self.val_attn_dim + 2 * key_dim * heads, bias=False)
        self.norm = nn.BatchNorm1d(self.val_attn_dim + 2 * key_dim * heads)
        self.biases = nn.Parameter(torch.randn(heads, 36))
        self.proj = nn.Linear(self.val_attn_dim, 12)
        self.head = nn.Linear(12, 4)
        steps = torch.arange(36)
        self.register_buffer("index", (steps[:, None] - steps[None]).abs())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        b, n, _ = y.shape
        fused = self.qkv(y)
        fused = self.norm(fused.flatten(0, 1)).reshape_as(fused).view(b, n, self.num_heads, -1)
        q, k, v = fused.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        weights = (q @ k * 0.5 + self.biases[:, self.index]).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(b, n, self.val_attn_dim)
        return self.head((y + self.proj(F.hardswish(mixed))).mean(1))


@network(image(3, 6), temperature=True)
class NonLocalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.theta, self.phi, self.g = conv(12, 8, 1), conv(12, 8, 1), conv(12, 7, 1)
        self.back, self.norm = conv(7, 12, 1), nn.BatchNorm2d(12)
        self.head = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b = y.size(0)
        g = self.g(y).view(b, 7, -1).permute(0, 2, 1)
        weights = torch.matmul(self.theta(y).view(b, 8, -1).transpose(1, 2), self.phi(y).view(b, 8, -1))
        z = torch.matmul(F.softmax(weights, dim=-1), g).permute(0, 2, 1).contiguous().view(b, 7, *y.shape[2:])
        return self.head(y + self.norm(self.back(z)))


@network(image(3, 6))
class GlobalContextBlock(nn.Module):
    """One attention map over the pixels pools the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mask = conv(3, 12), conv(12, 1, 1)
        self.transform = nn.Sequential(conv(12, 5, 1), nn.ReLU(), conv(5, 12, 1))
        self.head = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        weights = self.mask(y).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(y.view(b, c, h * w).unsqueeze(1), weights).view(b, c, 1, 1)
        return self.head(y + self.transform(context))


@network(image(3, 8), statistics=True, temperature=True)
class MobileVitBlock(nn.Module):
    """Features unfolded into patches, attention across patches, folded back, and concatenated with the input."""

    def __init__(self, width: int = 8, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.local, self.embed = conv(3, width), conv(width, 12, 1)
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 2, batch_first=True)
        self.project, self.fuse = conv(12, width, 1), conv(2 * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        short = self.local(x)
        y = self.embed(short)
        b, c, h, w = y.shape
        p = self.patch
        y = y.reshape(b * c * (h // p), p, w // p, p).transpose(1, 2)
        y = y.reshape(b, c, (h // p) * (w // p), p * p).transpose(1, 3).reshape(b * p * p, -1, c)
        z = self.norm(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        y = y.contiguous().view(b, p * p, (h // p) * (w // p), c).transpose(1, 3)
        y = y.reshape(b * c * (h // p), w // p, p, p).transpose(1, 2).reshape(b, c, h, w)
        return self.fuse(torch.cat((short, self.project(y)), dim=1))


@network(image(3, 6), statistics=True)
class GatedSpatialUnit(nn.Module):
    """gMLP: half of the features, normed and mixed along the tokens, gate the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 2, stride=2)
        self.up, self.down = nn.Linear(10, 24), nn.Linear(12, 10)
        self.norm, self.mix = nn.LayerNorm(12), nn.Linear(9, 9)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        u, v = F.gelu(self.up(y)).chunk(2, dim=-1)
        v = self.mix(self.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return self.head((y + self.down(u * v)).mean(1))


@network(words(8))
class SelectiveStateSpace(nn.Module):
    """Mamba: one projection into two halves, a depthwise causal convolution, an input-dependent recurrence."""

    def __init__(self, width: int = 10, inner: int = 14, state: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.embed = nn.Embedding(20, width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.head = nn.Linear(width, 4)

    def forward(self, index: Tensor) -> Tensor:
        y = self.embed(index)
        u, gate = self.in_proj(y).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[:, :, : u.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(u).split([self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.a_log))
        drive = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
        hidden = torch.zeros_like(drive[:, 0])
        steps = []
        for t in range(u.shape[1]):
            hidden = decay[:, t] * hidden + drive[:, t]
            steps.append((hidden * c[:, t].unsqueeze(1)).sum(-1))
        mixed = (torch.stack(steps, 1) + u * self.d) * F.silu(gate)
        return self.head(y + self.out_proj(mixed))
