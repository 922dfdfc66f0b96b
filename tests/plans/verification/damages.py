"""Small networks and everything that can be done to them behind the plan's back, each thing once."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.registry import settle

Damage = Callable[[Any], Any]


@dataclasses.dataclass
class Settings:
    width: int = 12
    scale: float = 0.7
    clip: tuple[float, float] = (-3.0, 3.0)


def shifted(offset: float) -> Callable[[Tensor], Tensor]:
    """A function that holds a number."""
    return lambda x: x + offset


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.1


class Attention(nn.Module):
    """Heads, a temperature, rotary tables in a plain attribute, a causal mask in a buffer, and slopes in a list."""

    scaled = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.temperature, self.causal = 2, 0.5, True
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.slopes, self.table = [0.1, 0.2], torch.linspace(0.9, 1.1, 5).view(5, 1)
        self.register_buffer("mask", torch.full((5, 5), -1e4).triu(1), persistent=False)
        self.extra = {"bias": torch.linspace(-1, 1, 5), "gain": 1.0, "steps": collections.deque([1, 2])}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((f(x) * self.table.to(x.dtype)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        scores = q @ k.transpose(-1, -2) * self.temperature * self.scaled * self.extra["gain"]
        scores = scores + self.extra["bias"].to(x.dtype) + (self.mask.to(x.dtype) if self.causal else 0)
        scores = torch.stack([s * (1 + slope) for s, slope in zip(scores.unbind(1), self.slopes, strict=True)], 1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """A residual stream; settings, functions, slots and objects in attributes; tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.slotted, self.name = Settings(), Slotted(), "tokens"
        self.embed, self.norm, self.attention = nn.Embedding(9, 12, padding_idx=0), nn.LayerNorm(12), Attention()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.RMSNorm(12, eps=1e-6)])
        self.gates = nn.ParameterList([torch.ones(12), torch.full((12,), 0.5)])
        self.act, self.again = F.gelu, functools.partial(F.leaky_relu, negative_slope=0.2)
        self.shift, self.places = shifted(0.25), (1, 2)
        self.space = types.SimpleNamespace(power=1.0)
        self.prior = torch.distributions.Normal(torch.tensor(0.1), torch.tensor(1.3))
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        x = x + self.attention(x) * self.settings.scale
        x = x + self.down(self.again(self.act(self.up(x)))).clamp(*self.settings.clip)
        for block, gate in zip(self.blocks[:2], self.gates, strict=True):
            x = x + block(x) * gate * self.slotted.gain ** self.space.power
        x = self.shift(x) * self.prior.scale.to(x.dtype) + self.prior.loc.to(x.dtype) * self.places[0]
        return self.head(self.blocks[2](x))


class Image(nn.Module):
    """Convolutions and norms of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.leaky = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gn, self.prelu, self.drop = nn.GroupNorm(2, 8), nn.PReLU(8), nn.Dropout(0.1)
        self.pool, self.up = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        self.back, self.instance = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.InstanceNorm2d(6, affine=True)
        self.elu, self.head, self.order = nn.ELU(0.9), nn.Linear(6, 4), [0, 1]
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.bn(self.a(x - self.mean)))
        x = self.drop(self.prelu(self.gn(self.c(self.b(x)))))
        x = self.elu(self.instance(self.back(self.up(self.pool(x)))))
        return self.head(x.flatten(2).mean(2)) / self.count


class Sequence(nn.Module):
    """Recurrent, bilinear and closed attention layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = nn.Linear(6, 8), nn.LSTM(8, 6, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.mha, self.softplus = nn.MultiheadAttention(12, 2, dropout=0.1, batch_first=True), nn.Softplus(1.5)
        self.bilinear, self.gelu = nn.Bilinear(12, 12, 5), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.gelu(self.stem(x)))
        y, _ = self.mha(x, x, x, need_weights=False)
        return self.bilinear(self.softplus(y), x)


def _tensor(place: str, change: Callable[[Tensor], Any]) -> Damage:
    """In place, the values of a tensor."""

    def damage(model: nn.Module) -> None:
        with torch.no_grad():
            change(functools.reduce(getattr, place.split("."), model))

    return damage


def _set(place: str, value: Any) -> Damage:
    path, _, name = place.rpartition(".")
    return lambda model: setattr(functools.reduce(getattr, path.split(".") if path else [], model), name, value)


def _first(factor: float) -> Callable[[Tensor], Any]:
    return lambda t: t.view(-1)[-2].mul_(factor)


def _next(tensor: Tensor) -> None:
    first = tensor.view(-1)[0]
    first.copy_(torch.nextafter(first, torch.ones((), dtype=tensor.dtype)))


def _swap(one: str, other: str) -> Damage:
    def damage(model: nn.Module) -> None:
        a, b = getattr(model, one), getattr(model, other)
        setattr(model, one, b)
        setattr(model, other, a)

    return damage


def _untied(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _transposed(model: Any) -> None:
    model.blocks[0].weight = nn.Parameter(model.blocks[0].weight.detach().flip(0))


DAMAGES: dict[type[nn.Module], dict[str, Damage]] = {
    Tokens: {
        "a weight 1 % larger": _tensor("up.weight", _first(1.01)),
        "a weight of the other sign": _tensor("down.weight", _first(-1.0)),
        "a bias 1 % larger": _tensor("up.bias", _first(1.01)),
        "all weights of a layer": _tensor("attention.q.weight", lambda t: t.mul_(1.01)),
        "two rows swapped": _tensor("attention.k.weight", lambda t: t.copy_(t[[1, 0, *range(2, len(t))]])),
        "two columns swapped": _tensor("down.weight", lambda t: t.copy_(t.flip(1))),
        "not a number": _tensor("down.bias", lambda t: t[0].fill_(math.nan)),
        "an embedding": _tensor("embed.weight", _first(1.01)),
        "a norm's weight": _tensor("norm.weight", _first(1.01)),
        "a norm's bias": _tensor("norm.bias", _first(1.01)),
        "a weight nobody named": _tensor("gates", lambda t: t[1].data[2].mul_(1.01)),
        "equal layers swapped": lambda m: _swap("0", "1")(m.blocks),
        "projections swapped": lambda m: _swap("q", "k")(m.attention),
        "a flipped weight": _transposed,
        "a tie cut": _untied,
        "a tie made": lambda m: setattr(m.blocks[0], "weight", m.blocks[1].weight),
        "eps of a LayerNorm": _set("norm.eps", 1e-6),
        "eps of an RMSNorm": lambda m: setattr(m.blocks[2], "eps", 1e-5),
        "eps of an RMSNorm to the type's own": lambda m: setattr(m.blocks[2], "eps", None),
        "padding_idx": _set("embed.padding_idx", None),
        "max_norm": _set("embed.max_norm", 0.1),
        "num_heads": _set("attention.num_heads", 1),
        "temperature": _set("attention.temperature", 0.51),
        "a flag": _set("attention.causal", False),
        "an attribute over the class's": _set("attention.scaled", 1.51),
        "a number in a list": lambda m: m.attention.slopes.__setitem__(1, 0.21),
        "numbers of a list swapped": lambda m: m.attention.slopes.reverse(),
        "a number more in a list": lambda m: m.attention.slopes.append(0.3),
        "a tensor held as an attribute": _tensor("attention.table", _first(1.01)),
        "a table replaced": lambda m: setattr(m.attention, "table", m.attention.table.flip(0)),
        "an entry of a mask": _tensor("attention.mask", lambda t: t[1, 0].fill_(-1.0)),
        "a tensor in a dict": lambda m: m.attention.extra["bias"][2].add_(0.01),
        "a number in a dict": lambda m: m.attention.extra.update(gain=1.01),
        "an entry more in a dict": lambda m: m.attention.extra.update(more=1.01),
        "an entry gone from a dict": lambda m: m.attention.extra.pop("steps"),
        "a number in a deque": lambda m: m.attention.extra["steps"].append(m.attention.extra["steps"].popleft()),
        "a setting": _set("settings.scale", 0.71),
        "a setting's pair": _set("settings.clip", (-3.0, 2.9)),
        "a size in the settings": _set("settings.width", 13),
        "a slot": _set("slotted.gain", 1.11),
        "a namespace": _set("space.power", 1.01),
        "a text": _set("name", "token"),
        "a pair": _set("places", (2, 1)),
        "an activation": _set("act", F.silu),
        "what a function was given": _set("again", functools.partial(F.leaky_relu, negative_slope=0.21)),
        "what a closure holds": _set("shift", shifted(0.26)),
        "what a distribution holds": lambda m: setattr(m.prior, "loc", torch.tensor(0.11, dtype=m.prior.loc.dtype)),
        "an attribute more": _set("attention.window", 3),
        "an attribute gone": lambda m: delattr(m, "name"),
        "one gradient off": lambda m: m.up.weight.requires_grad_(False),
        "one module training": lambda m: m.norm.train(),
        "another type of number": _set("settings.width", 12.0),
        "another precision": lambda m: setattr(m.attention, "table", m.attention.table.to(torch.float16)),
    },
    Image: {
        "a weight 1 % larger": _tensor("b.weight", _first(1.01)),
        "the smallest change of a weight": _tensor("b.weight", _next),
        "a sign of zero": _tensor("bn.bias", lambda t: t[0].mul_(-1.0)),
        "equal convolutions swapped": _swap("b", "c"),
        "a running mean": _tensor("bn.running_mean", _first(1.01)),
        "a running variance": _tensor("bn.running_var", _first(1.01)),
        "a buffer": _tensor("mean", _first(1.01)),
        "a counted buffer": _tensor("count", lambda t: t.add_(1)),
        "a slope": _tensor("prelu.weight", _first(1.01)),
        "eps of a batch norm": _set("bn.eps", 2e-5),
        "momentum": _set("bn.momentum", 0.9),
        "no momentum": _set("bn.momentum", None),
        "track_running_stats": _set("bn.track_running_stats", False),
        "eps of a group norm": _set("gn.eps", 2e-5),
        "num_groups": _set("gn.num_groups", 1),
        "eps of an instance norm": _set("instance.eps", 1e-3),
        "use_input_stats": _set("instance.track_running_stats", True),
        "negative_slope": _set("leaky.negative_slope", 0.11),
        "alpha": _set("elu.alpha", 0.91),
        "p of a dropout": _set("drop.p", 0.9),
        "stride": _set("b.stride", (2, 2)),
        "padding": _set("b.padding", (0, 0)),
        "padding_mode": _set("b.padding_mode", "reflect"),
        "dilation": _set("a.dilation", (2, 2)),
        "groups": _set("c.groups", 1),
        "output_padding": _set("back.output_padding", (1, 1)),
        "kernel of a pool": _set("pool.kernel_size", 1),
        "ceil_mode": _set("pool.ceil_mode", True),
        "scale_factor": _set("up.scale_factor", 4.0),
        "mode": _set("up.mode", "bilinear"),
        "another activation": _set("leaky", nn.ReLU()),
        "no dropout": _set("drop", nn.Identity()),
        "a bias gone": _set("head.bias", None),
        "a bias more": lambda m: m.head.register_parameter("more", nn.Parameter(torch.zeros(4))),
        "a buffer that is saved no more": lambda m: m._non_persistent_buffers_set.add("mean"),
        "numbers of a list swapped": lambda m: m.order.reverse(),
        "out_features": _set("head.out_features", 5),
        "in_channels": _set("a.in_channels", 4),
        "num_features": _set("bn.num_features", 7),
        "one module training": lambda m: m.bn.train(),
        "a layer more": lambda m: m.add_module("late", nn.ReLU()),
    },
    Sequence: {
        "a weight 1 % larger": _tensor("lstm.weight_hh_l0", _first(1.01)),
        "a bias 1 % larger": _tensor("lstm.bias_ih_l1", _first(1.01)),
        "a closed attention's weight": _tensor("mha.in_proj_weight", _first(1.01)),
        "a closed attention's output": _tensor("mha.out_proj.weight", _first(1.01)),
        "num_heads": _set("mha.num_heads", 3),
        "head_dim": _set("mha.head_dim", 5),
        "dropout of attention": _set("mha.dropout", 0.2),
        "batch_first of attention": _set("mha.batch_first", False),
        "add_zero_attn": _set("mha.add_zero_attn", True),
        "dropout of an LSTM": _set("lstm.dropout", 0.2),
        "hidden_size": _set("lstm.hidden_size", 4),
        "bidirectional": _set("lstm.bidirectional", False),
        "a bilinear weight": _tensor("bilinear.weight", _first(1.01)),
        "beta": _set("softplus.beta", 1.51),
        "threshold": _set("softplus.threshold", 2),
        "approximate": _set("gelu.approximate", "tanh"),
    },
}


def made(kind: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The network, its plain tensors in its own precision too, and an input."""
    torch.manual_seed(0)
    net = kind()
    settle(net)
    if isinstance(net, Image):
        nn.init.zeros_(net.bn.bias)
    x = {Tokens: torch.randint(1, 9, (2, 5)), Image: torch.randn(2, 3, 8, 8)}.get(kind, torch.randn(2, 5, 6))
    if isinstance(net, Tokens):
        net.attention.table = net.attention.table.to(dtype)
    return net.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x
