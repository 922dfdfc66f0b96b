"""Trained networks of repeated layers for `bench_layers`: what is measured, on which data, and how well they do."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from models import tiny_vit
from tools.bench_accuracy import loaders


@dataclasses.dataclass
class Task:
    """A trained network. `data`: pairs to rank layers on, no test data among them. `measure`: its figure of merit.
    `given`: it was not trained here, so that figures of merit hold on every machine."""

    model: nn.Module
    example: Any
    data: list[tuple[Any, Any]]
    loss_fn: Callable[[Any, Any], Tensor]
    measure: Callable[[nn.Module], float]
    unit: str
    steps: int
    given: bool = False


def resnet56() -> Task:
    """CIFAR-10 ResNet-56 of the shared data folder."""
    shared = loaders()
    x, y = shared.cifar10("train", 512)
    test_x, test_y = shared.cifar10("test")
    data = list(zip(x.split(64), y.split(64), strict=True))
    return Task(
        shared.resnet56(), x[:1], data, F.cross_entropy, lambda m: shared.top1(m, test_x, test_y), "top-1, %", 10, True
    )


def vit() -> Task:
    """A vision transformer of six layers on scikit-learn's digits: 1,397 for training, 400 for the figures."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.images[order] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target[order])
    torch.manual_seed(0)
    model = type(tiny_vit()[0])(depth=6)
    _train(model, lambda: _batch(x[:1397], y[:1397], 64), F.cross_entropy, 500)
    data = list(zip(x[:512].split(64), y[:512].split(64), strict=True))

    def measure(net: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((net(x[1397:]).argmax(1) == y[1397:]).float().mean())

    return Task(model, x[:1], data, F.cross_entropy, measure, "top-1, %", 5)


class Llama(nn.Module):
    """A small decoder as Llama is built: RMS norms, rotary positions, grouped queries, gated MLPs. Reads bytes."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 4, shared: int = 2, hidden: int = 256) -> None:
        super().__init__()
        self.num_layers = depth
        self.embed = nn.Embedding(128, width)
        self.layers = nn.ModuleList(_DecoderLayer(width, heads, shared, hidden, i) for i in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers[: self.num_layers]:
            hidden = layer(hidden)
        out: Tensor = self.head(self.norm(hidden))
        return out


class _DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, hidden: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = _Attention(width, heads, shared), _GatedMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.features = heads, shared, width // heads
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * self.features, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.features)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = _rotated(q), _rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class _GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on (batch, heads, tokens, features)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 10000 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def llama() -> Task:
    """A byte-level language model of six layers on the source of Python's textwrap and inspect modules."""
    text = inspect.getsource(inspect) + inspect.getsource(textwrap)
    codes = torch.tensor([min(byte, 127) for byte in text.encode()])
    rows = codes[: len(codes) // 65 * 65].view(-1, 65)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    train, test = rows[:-200], rows[-200:]
    torch.manual_seed(0)
    model = Llama()

    def loss_fn(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    _train(model, lambda: (lambda b: (b[:, :-1], b[:, 1:]))(_batch(train, train, 32)[0]), loss_fn, 700)
    data = [(b[:, :-1], b[:, 1:]) for b in train[:256].split(32)]

    def measure(net: nn.Module) -> float:
        with torch.no_grad():
            return float(loss_fn(net(test[:, :-1]), test[:, 1:]))

    return Task(model, train[:1, :-1], data, loss_fn, measure, "nats per byte", 5)


def _batch(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    picked = torch.randint(0, len(x), (size,))
    return x[picked], y[picked]


def _train(
    model: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]], loss_fn: Callable[[Any, Any], Tensor], steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        inputs, wanted = batch()
        optimizer.zero_grad()
        loss_fn(model(inputs), wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


TASKS: dict[str, Callable[[], Task]] = {"resnet56": resnet56, "vit": vit, "llama": llama}
