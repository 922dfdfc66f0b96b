"""Blocks of random networks that work on images: each draws its own configuration and is written as users write."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Choice = TypeVar("Choice")
Rng = np.random.Generator


def pick(rng: Rng, options: Sequence[Choice]) -> Choice:
    return options[int(rng.integers(len(options)))]


def width(rng: Rng, multiple: int = 1, low: int = 4, high: int = 20) -> int:
    """A number of channels, a multiple of `multiple`."""
    return multiple * int(rng.integers(-(-low // multiple), max(high // multiple, -(-low // multiple)) + 1))


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0]


def literal(value: Any) -> Callable[[], Any]:
    """A number that stands in the source, not in an attribute of a module."""
    return lambda: value


def activation(rng: Rng, channels: int) -> nn.Module:
    return pick(rng, [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.PReLU(channels), nn.Identity(),
                      nn.LeakyReLU(0.1), nn.ReLU(inplace=True)])  # fmt: skip


class Block(nn.Module):
    """`statistics`: takes a statistic over channels; `temperature`: an attention whose scale may be folded."""

    statistics = False
    temperature = False


class ChannelsLastNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvUnit(Block):
    """Any convolution, then perhaps a norm and an activation."""

    def __init__(self, rng: Rng, channels: int, size: int, outputs: int | None = None) -> None:
        super().__init__()
        bias = bool(rng.random() < 0.6)
        kinds = ["1x1", "3x3", "3x3", "dilated", "depthwise", "grouped", "grouped", "asymmetric"]
        if outputs is None:
            kinds += (["strided"] if size >= 4 else []) + (["transposed", "transposed_grouped"] if size <= 4 else [])
        kind = pick(rng, kinds)
        o = outputs or width(rng)
        if kind == "depthwise" and (outputs is None or outputs % channels == 0):
            o = outputs or channels * (2 if channels <= 12 and rng.random() < 0.4 else 1)
            conv: nn.Module = nn.Conv2d(channels, o, 3, padding=1, groups=channels, bias=bias)
        elif kind in ("grouped", "transposed_grouped"):
            groups = pick(rng, [d for d in divisors(channels) if outputs is None or outputs % d == 0] or [1])
            o = outputs or width(rng, groups)
            if kind == "grouped":
                conv = nn.Conv2d(channels, o, 3, padding=1, groups=groups, bias=bias)
            else:
                conv = nn.ConvTranspose2d(channels, o, 2, stride=2, groups=groups, bias=bias)
        elif kind == "transposed":
            conv = nn.ConvTranspose2d(channels, o, 4, stride=2, padding=1, bias=bias)
        elif kind == "strided":
            conv = nn.Conv2d(channels, o, 3, stride=2, padding=1, bias=bias)
        elif kind == "dilated":
            conv = nn.Conv2d(channels, o, 3, padding=2, dilation=2, bias=bias)
        elif kind == "asymmetric":
            conv = nn.Conv2d(channels, o, (1, 3), padding=(0, 1), bias=bias)
        else:
            conv = nn.Conv2d(channels, o, 3 if kind == "3x3" else 1, padding="same" if kind == "3x3" else 0, bias=bias)
        self.conv = conv
        norm = pick(rng, ["none"] * 5 + ["batch"] * 7 + ["group", "group", "instance", "layer"])
        if norm == "batch":
            self.norm: nn.Module = nn.BatchNorm2d(o, affine=bool(rng.random() < 0.85))
        elif norm == "group":
            self.norm = nn.GroupNorm(pick(rng, [1, *divisors(o)]), o)
        elif norm == "instance" and size > 2:
            self.norm = nn.InstanceNorm2d(o, affine=bool(rng.random() < 0.7))
        elif norm == "layer":
            self.norm = ChannelsLastNorm(o)
        else:
            self.norm = nn.Identity()
        self.act = activation(rng, o)
        self.statistics = norm in ("group", "layer")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualUnit(Block):
    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        middle = width(rng)
        first, second = ConvUnit(rng, channels, size, middle), ConvUnit(rng, middle, size, channels)
        self.body = nn.Sequential(first, second)
        self.scale = nn.Parameter(torch.ones(channels)) if rng.random() < 0.3 else None
        self.how = pick(rng, ["after", "before", "in_place"])
        self.statistics = first.statistics or second.statistics

    def forward(self, x: Tensor) -> Tensor:
        branch = self.body(x)
        if self.scale is not None:
            branch = branch * self.scale.view(1, -1, 1, 1)
        if self.how == "in_place":
            total = x * 0.9
            total += branch
            return total
        return x + branch if self.how == "after" else branch + x


class Gate(Block):
    """Squeeze and excitation in several styles, or a gate of one channel."""

    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.how = pick(rng, ["convolution", "view", "literal", "attribute", "index", "plane", "full"])
        self.channels = channels
        self.literal = literal(channels)
        hidden = width(rng, low=2, high=8)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.reduce, self.expand = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.plane, self.full = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "convolution":
            return x * self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        if self.how == "plane":
            return x * torch.sigmoid(self.plane(x))
        if self.how == "full":
            return torch.sigmoid(self.full(x)) * x
        b, c = x.size(0), x.size(1)
        y = F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        if self.how == "view":
            return x * y.view(b, c, 1, 1)
        if self.how == "literal":
            return x * y.view(-1, self.literal(), 1, 1)
        return x * (y.reshape(b, self.channels, 1, 1) if self.how == "attribute" else y[:, :, None, None])


class Shuffle(Block):
    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.groups = pick(rng, divisors(channels))
        self.channels = channels
        self.per_group = channels // self.groups
        self.sizes = pick(rng, ["shape", "attribute", "derived", "literal"])
        self.literals = literal((self.groups, self.per_group, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.sizes == "shape":
            return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        if self.sizes == "attribute":
            return x.view(b, self.groups, -1, h, w).transpose(1, 2).contiguous().view(b, self.channels, h, w)
        if self.sizes == "derived":
            return x.reshape(b, self.groups, self.per_group, h, w).transpose(1, 2).flatten(1, 2)
        groups, rest, total = self.literals()
        return x.view(-1, groups, rest, h, w).transpose(1, 2).reshape(-1, total, h, w)


class Divide(Block):
    """The channels divided into parts, by sizes from anywhere, and put together again."""

    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.how = pick(rng, ["chunk", "shape", "split", "list", "literal", "narrow"])
        even = channels % 2 == 0
        self.first = channels // 2 if even and rng.random() < 0.6 else int(rng.integers(1, channels))
        if self.how in ("chunk", "shape", "split"):
            self.first = -(-channels // 2)
        self.second = channels - self.first
        self.sizes = [self.first, self.second]
        self.literals = literal((self.first, self.second))
        equal = self.first == self.second
        self.join = pick(rng, ["swap", "convolve", "first", *(["add", "gate", "interleave"] if equal else [])])
        self.conv = nn.Conv2d(self.first, self.first, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunk":
            a, b = x.chunk(2, dim=1)
        elif self.how == "shape":
            part = (x.shape[1] + 1) // 2
            a, b = x[:, :part], x[:, part:]
        elif self.how == "split":
            a, b = torch.split(x, self.first, dim=1)
        elif self.how == "list":
            a, b = torch.split(x, self.sizes, dim=1)
        elif self.how == "literal":
            first, second = self.literals()
            a, b = x[:, :first], x[:, -second:]
        else:
            a, b = x.narrow(1, 0, self.first), x.narrow(1, self.first, self.second)
        if self.join == "swap":
            return torch.cat([b.relu(), a], 1)
        if self.join == "convolve":
            return torch.cat((self.conv(a), b), dim=1)
        if self.join == "first":
            return a * 1.5
        if self.join == "add":
            return a + b.tanh()
        if self.join == "gate":
            return a * b.sigmoid()
        return torch.stack([a, b], 2).flatten(1, 2)


class Reorder(Block):
    """Slices, repetitions and permutations of the channels."""

    order: Tensor

    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        kinds = ["flip", "roll", "roll_literal", "index", "list", "stride", "tail", "overlap"]
        if channels <= 12:
            kinds += ["repeat", "interleave", "twice", "expand", "doubled_conv"]
        self.how = pick(rng, kinds)
        self.shift = int(rng.integers(1, channels))
        self.literal = literal(self.shift)
        self.times = 2
        self.register_buffer("order", torch.from_numpy(rng.permutation(channels)))
        self.list = [int(i) for i in rng.permutation(channels)]
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.how == "flip":
            return x.flip(1)
        if self.how == "roll":
            return torch.roll(x, self.shift, 1)
        if self.how == "roll_literal":
            return x.roll(shifts=self.literal(), dims=1)
        if self.how == "index":
            return x[:, self.order]
        if self.how == "list":
            return x[:, self.list]
        if self.how in ("stride", "tail"):
            return x[:, ::2] * 1.2 if self.how == "stride" else x[:, -self.literal() :]
        if self.how == "overlap":
            return x[:, 1:] + x[:, :-1].relu()
        if self.how == "repeat":
            return x.repeat(1, self.times, 1, 1)
        if self.how == "interleave":
            return x.repeat_interleave(self.times, dim=1)
        if self.how == "expand":
            return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(b, c * 2, h, w)
        return torch.cat([x, self.conv(x)] if self.how == "doubled_conv" else [x, x], 1)


class Space(Block):
    """Channels to space and back, pooling, resizing, spatial padding and rolling."""

    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        kinds = ["max", "roll", "pad", "adaptive"] + (["average", "unshuffle"] if size % 2 == 0 and size >= 4 else [])
        if channels % 4 == 0 and size <= 6:
            kinds += ["shuffle", "shuffle"]
        if size <= 6:
            kinds += ["nearest", "bilinear"]
        self.how = pick(rng, kinds)
        if self.how == "unshuffle" and channels > 8:
            self.how = "average"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "max":
            return F.max_pool2d(x, 3, 1, 1)
        if self.how == "average":
            return F.avg_pool2d(x, 2)
        if self.how == "adaptive":
            return F.adaptive_avg_pool2d(x, (3, 2))
        if self.how == "roll":
            return torch.roll(x, (1, -1), (2, 3)).flip(-1)
        if self.how == "pad":
            return F.pad(x, (1, 0, 0, 1), value=0.3)
        if self.how == "shuffle":
            return F.pixel_shuffle(x, 2)
        if self.how == "unshuffle":
            return F.pixel_unshuffle(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode=self.how)


class BareParameters(Block):
    scale: Tensor

    def __init__(self, rng: Rng, channels: int, size: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.how = pick(rng, ["scale", "position", "buffer", "conv", "pixel", "standardised"])
        values = torch.randn(1, channels, *(shape if self.how == "position" else (1, 1)))
        if self.how == "pixel":
            values = torch.randn(1, 1, *shape)
        if self.how == "buffer":
            self.register_buffer("scale", values)
        else:
            self.scale = nn.Parameter(values)
        outputs = width(rng)
        self.weight = nn.Parameter(0.3 * torch.randn(outputs, channels, 3, 3))
        self.bias = nn.Parameter(0.3 * torch.randn(outputs))
        self.statistics = self.how == "standardised"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "position":
            return x + self.scale
        if self.how == "conv":
            return F.conv2d(x, self.weight, self.bias, padding=1)
        if self.how == "standardised":
            mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (std + 0.1), padding=1) * 0.2
        return x * self.scale


class GatedChannels(Block):
    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.hidden = width(rng, low=3, high=10)
        self.conv = nn.Conv2d(channels, 2 * self.hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * self.hidden) if rng.random() < 0.5 else nn.Identity()
        self.how = pick(rng, ["glu", "chunk", "pairs", "maxout", "outer"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.how == "glu":
            return F.glu(y, 1)
        if self.how == "chunk":
            a, b = y.chunk(2, 1)
            return F.silu(a) * b
        if self.how == "pairs":
            a, b = y.unflatten(1, (self.hidden, 2)).unbind(2)
            return a * b.sigmoid()
        n, c, h, w = y.shape
        if self.how == "maxout":
            return y.view(n, c // 2, 2, h, w).max(2).values
        return y.view(n, 2, self.hidden, h, w).sum(1)


class InPlaceWrites(Block):
    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.how = pick(rng, ["head", "tail", "strided", "add", "fill", "assemble"])
        self.part = int(rng.integers(1, channels))
        self.literal = literal(self.part)
        self.conv, self.strided = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, -(-channels // 2), 1)
        self.piece = nn.Conv2d(channels, self.part, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "head":
            y[:, : self.part] = y[:, : self.part] * 2
        elif self.how == "tail":
            y[:, -self.literal() :] += self.piece(x)
        elif self.how == "strided":
            y[:, ::2] = self.strided(x)
        elif self.how == "add":
            y.mul_(0.5).add_(x)
        elif self.how == "fill":
            y.masked_fill_(y < -0.3, 0.1)
        else:
            z = x.new_zeros(y.shape)
            z[:, : self.part] = self.piece(x)
            z[:, self.part :] = y[:, self.part :]
            return z
        return y


class AcrossChannels(Block):
    """Statistics over the channels of a pixel."""

    def __init__(self, rng: Rng, channels: int, size: int) -> None:
        super().__init__()
        self.how = pick(rng, ["summary", "euclidean", "mean", "softmax", "slide"])
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.slide = nn.Conv1d(1, 1, 3, padding=1)
        self.statistics = self.how in ("summary", "mean", "softmax")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "summary":
            return x * self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        if self.how == "euclidean":
            return F.normalize(x, dim=1, eps=1e-3) * 2
        if self.how == "mean":
            return x - x.mean(dim=1, keepdim=True)
        if self.how == "softmax":
            return x.softmax(1) * 4
        return x * self.slide(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2).unsqueeze(-1)
