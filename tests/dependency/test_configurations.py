"""Sizes that forward reads from a settings object: they follow in the copy's object, and the user's own stays."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.support.settings import settings_of


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


class Items(dict[str, Any]):
    """A dict whose items are read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Both(dict[str, Any]):
    """A dict that keeps each value as an attribute too."""

    def __init__(self, **items: Any) -> None:
        super().__init__()
        for name, value in items.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        super().__setitem__(name, value)


OBJECTS = (SimpleNamespace, argparse.Namespace, Items, Both)


@pytest.mark.parametrize("make", [Settings, *(lambda kind=kind: kind(**vars(Settings())) for kind in OBJECTS)])
@pytest.mark.parametrize("output", ["module", "hybrid"])
def test_heads_follow_in_the_copy(make: Any, output: str, tmp_path: Path) -> None:
    model, x = Model(make()).eval(), torch.randn(2, 5, 24)
    before = settings_of(model.config)
    small = graphprune.prune(model, x, 0.5, granularity="heads", output=output)
    assert small.layers[0].q.weight.shape == (12, 24)
    assert settings_of(model.config) == before and model.layers[0].config is model.config
    assert all(type(v) in (int, tuple) for v in settings_of(model.config).values())
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


class Named(NamedTuple):
    heads: int = 4
    features: int = 6
    width: int = 24


@pytest.mark.parametrize("make", [Named, lambda: {"heads": 4, "features": 6, "width": 24}])
def test_of_tuples_and_dicts_each_module_has_its_own(make: Any) -> None:
    class Reading(Attention):
        def __init__(self, config: Any) -> None:
            super().__init__(config if isinstance(config, tuple) else SimpleNamespace(**config))
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            c = self.config
            heads, features = c[:2] if isinstance(c, tuple) else (c["heads"], c["features"])
            q, k, v = (p(x).view(*x.shape[:2], heads, features).transpose(1, 2) for p in (self.q, self.k, self.v))
            mixed = torch.softmax(q @ k.mT * 0.4, -1) @ v
            return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], heads * features))

    shared = make()
    model, x = nn.Sequential(Reading(shared), Reading(shared)).eval(), torch.randn(2, 5, 24)
    small = graphprune.prune(model, x, {"0": 0.5}, granularity="heads")
    assert small[0].q.weight.shape == (12, 24) and small[1].q.weight.shape == (24, 24)
    found = [settings_of(layer.config)["heads"] for layer in (*small, *model)]
    assert found == [2, 4, 4, 4] and type(small[0].config) is type(shared) and model[0].config is shared
