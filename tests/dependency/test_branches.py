from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from graphprune import GraphPruneError
from graphprune.dependency.branches import find_branches
from graphprune.modules import Silence
from graphprune.surgery import remove_layers
from graphprune.verification import verify_layers
from tests.layered_networks import networks

STYLES = ("pre-norm", "scaled", "post-norm", "parallel", "subtracted", "in place")


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))


class Mixer(nn.Module):
    """Mixes tokens; returns a tuple, and takes its stream by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.tokens = nn.Linear(width, width), nn.Linear(5, 5)

    def forward(self, *, stream: Tensor) -> tuple[Tensor, None]:
        return self.tokens(self.linear(stream).mT).mT, None


class Layer(nn.Module):
    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.mixer, self.mlp = Mixer(width), Mlp(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, without: frozenset[str] = frozenset()) -> Tensor:
        def mixer(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if "mixer" in without else self.mixer(stream=x)[0]

        def mlp(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if "mlp" in without else self.mlp(x)

        if self.style == "parallel":
            return mixer(self.norm1(x)) + mlp(self.norm2(x)) + x
        if self.style == "post-norm":
            x = self.norm1(mixer(x) + x)
            return self.norm2(x + mlp(x))
        if self.style == "subtracted":
            x = x - mixer(self.norm1(x))
            return mlp(self.norm2(x)) - x
        if self.style == "in place":
            x = x.add_(mixer(self.norm1(x)))
            return x.add_(mlp(self.norm2(x)))
        factor = self.scale if self.style == "scaled" else 1.0
        x = x + torch.dropout(mixer(self.norm1(x)), 0.1, self.training) * factor
        return x + factor * mlp(self.norm2(x)).clone()


class Network(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(Layer(6, style) for _ in range(2))

    def forward(self, x: Tensor, without: frozenset[str] = frozenset()) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, frozenset(n.rpartition(".")[2] for n in without if n.startswith(f"layers.{i}.")))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("style", STYLES)
def test_every_subset_of_branches_adds_nothing(style: str) -> None:
    torch.manual_seed(0)
    model, x = Network(style).eval(), torch.randn(2, 5, 3)
    branches = find_branches(model, x)
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("mixer", "mlp")]
    assert sorted(b.module for b in branches) == names
    for k in range(1, 5):
        for chosen in itertools.combinations(branches, k):
            small = remove_layers(model, chosen)
            torch.testing.assert_close(small(x), model(x, frozenset(b.module for b in chosen)))
            assert verify_layers(model, small, chosen, x).passed
            assert not any(list(small.get_submodule(b.module).parameters()) for b in chosen)
    assert type(small) is Network and all(type(layer) is Layer for layer in small.layers)
    assert isinstance(small.layers[0].mlp, Silence)


class Other(nn.Module):
    """What is no branch: each result is more than an addend, or zero would not pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.part, self.after = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        if self.how == "activated":
            return x + torch.exp(y)
        if self.how == "followed":
            return x + self.after(y)
        if self.how == "read twice":
            return x + y + y.abs().sum()
        if self.how == "product":
            return x * y
        if self.how == "after a sum":
            return (y + 1.0).mul(2.0) + x
        if self.how == "divisor":
            return x + x / y
        if self.how == "another stream":
            return y + torch.ones_like(x)
        return y


@pytest.mark.parametrize(
    "how", ["activated", "followed", "read twice", "product", "after a sum", "divisor", "another stream", "alone"]
)
def test_what_is_no_branch(how: str) -> None:
    found = find_branches(nn.Sequential(Other(how)).eval(), torch.randn(3, 4))
    assert [b.module for b in found if b.module != "0.after"] == []


def test_inline_attention_is_none() -> None:
    """Its last projection alone would leave the rest to be computed for nothing."""
    model, x, _ = networks()["decoder"]
    assert [b.module for b in find_branches(model, x)] == [f"layers.{i}.attention" for i in range(4)]
    with pytest.raises(GraphPruneError, match=r"torch\.nn\.Module"):
        find_branches("model", x)  # type: ignore[arg-type]
