"""Sizes that forward reads from a settings object: they follow in the copy's object, and the user's own stays."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.tracing.cloning import is_configuration


@dataclasses.dataclass
class Settings:
    heads: int = 4
    features: int = 6
    width: int = 24
    sizes: tuple[int, int] = (16, 24)
    unused: int = 4


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v = (nn.Linear(config.width, config.heads * config.features) for _ in range(3))
        self.out = nn.Linear(config.heads * config.features, config.width)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        q, k, v = (p(x).view(*x.shape[:2], c.heads, c.features).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.mT * 0.4, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], c.heads * c.features))


class Model(nn.Module):
    def __init__(self, config: Any, layers: int = 2) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Attention(config) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("make", [Settings, lambda: SimpleNamespace(**vars(Settings()))])
@pytest.mark.parametrize("output", ["module", "hybrid"])
def test_heads_follow_in_the_copy(make: Any, output: str, tmp_path: Path) -> None:
    model, x = Model(make()).eval(), torch.randn(2, 5, 24)
    before = vars(model.config).copy()
    small = graphprune.prune(model, x, 0.5, granularity="heads", output=output)
    assert small.layers[0].q.weight.shape == (12, 24)
    assert vars(model.config) == before and model.layers[0].config is model.config
    assert all(type(v) in (int, tuple) for v in vars(model.config).values())
    if output == "module":
        assert small.config.heads == 2 and small.config.unused == 4 and small.config is not model.config
        assert all(layer.config is small.config for layer in small.layers)
        path = graphprune.save(small, tmp_path / "small.safetensors")
        again = graphprune.load(path, lambda: Model(make())).eval()
        assert torch.equal(again(x), small(x)) and again.config.heads == 2


def test_one_setting_read_by_two_layers_has_one_value() -> None:
    model, x = Model(Settings()).eval(), torch.randn(2, 5, 24)
    plan = graphprune.plan(model, x, {"layers.0": 0.5}, granularity="heads")
    lengths = {name: len(axes.get(0, ())) for name, axes in plan.removed.items() if name.endswith("q.weight")}
    assert not lengths or len(lengths) == 2  # both or none: the other layer reads the same number
    graphprune.prune(model, x, {"layers.0": 0.5}, granularity="heads")


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.first, self.second = nn.Linear(3, 40), nn.Linear(16, 3)
        self.third = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.config.sizes, -1)
        return self.second(a) + self.third(b)


def test_numbers_in_tuples_of_settings() -> None:
    model, x = Sliced().eval(), torch.randn(2, 3)
    small = graphprune.prune(model, x, 0.5)
    assert small.config.sizes == (small.second.in_features, small.third.in_features) == (8, 12)
    assert model.config.sizes == (16, 24)


class Failing(Model):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_settings_are_put_back_after_an_error() -> None:
    model = Failing(Settings())
    with pytest.raises(graphprune.GraphPruneError, match="no"):
        graphprune.plan(model, torch.randn(2, 5, 24), 0.5)
    assert vars(model.config) == vars(Settings()) and type(model.config.heads) is int


class Mode(enum.Enum):
    FAST = 4


class Odd:
    def __deepcopy__(self, memo: Any) -> Odd:
        return self


def test_what_is_no_settings_object() -> None:
    plain = SimpleNamespace(a=1)
    assert is_configuration(plain) and is_configuration(Settings())
    for value in (Mode.FAST, Odd(), nn.Linear(1, 1), torch.zeros(1), lambda: 1, Settings, 3, "x", [1], {"a": 1}, torch):
        assert not is_configuration(value), value
