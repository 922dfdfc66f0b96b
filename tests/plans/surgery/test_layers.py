from __future__ import annotations

import argparse
import itertools
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from graphprune import GraphPruneError
from graphprune.dependency.whole.blocks import Block, find_blocks
from graphprune.plans.modules.bypass import Bypass
from graphprune.plans.surgery import remove_layers
from graphprune.plans.verification import verify_layers
from graphprune.support.settings import settings_of
from tests.layered_networks import Decoder, Stages, networks


@pytest.mark.parametrize("name", ["stages", "attributes", "decoder", "chain"])
def test_every_subset_is_the_network_with_its_layers_skipped(name: str) -> None:
    model, example, _ = networks()[name]
    blocks = find_blocks(model, example)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for k in (1, 2, len(blocks)):
        for subset in itertools.combinations(blocks, k):
            small = remove_layers(model, subset)
            report = verify_layers(model, small, subset, example)
            assert report.passed, str(report)
            gone = {id(t) for b in subset for t in model.get_submodule(b.module).parameters()}
            numel = sum(p.numel() for p in model.parameters() if id(p) not in gone)
            assert sum(p.numel() for p in small.parameters()) == numel
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def plain_decoder(model: Decoder, tokens: torch.Tensor, skip: set[int]) -> torch.Tensor:
    """Written out, independent of hooks and lists."""
    n = tokens.shape[1]
    mask = torch.full((n, n), -1e4).triu(1)
    hidden = model.embed(tokens)
    for i, layer in enumerate(model.layers):
        if i not in skip:
            hidden = layer(hidden, mask if layer.kind == "full" else mask * 0.5, [None] * 9)[0]
    return model.head(model.norm(hidden))


@pytest.mark.parametrize("skip", [{0}, {1, 2}, {0, 3}, {0, 1, 2, 3}])
def test_indices_and_configuration_follow(skip: set[int]) -> None:
    model, tokens, _ = networks()["decoder"]
    blocks = find_blocks(model, tokens)
    small = remove_layers(model, [b for i, b in enumerate(blocks) if i in skip])
    torch.testing.assert_close(small(tokens), plain_decoder(model, tokens, skip))
    assert [layer.attention.layer_idx for layer in small.layers] == list(range(4 - len(skip)))
    kinds = [kind for i, kind in enumerate(["full", "sliding", "full", "sliding"]) if i not in skip]
    assert small.config.num_hidden_layers == 4 - len(skip) and small.config.layer_types == kinds
    assert small.config.heads == 4 and all(layer.config is small.config for layer in small.layers)
    assert model.config.num_hidden_layers == 4 and len(model.layers) == len(model.config.layer_types) == 4
    assert [layer.attention.layer_idx for layer in model.layers] == [0, 1, 2, 3]


class Counted(NamedTuple):
    num_layers: int
    sizes: tuple[int, ...]


class Single(SimpleNamespace):
    """There is one of it, and copies are that one."""

    def __deepcopy__(self, memo: Any) -> Single:
        return self


def counting(config: Any) -> nn.Module:
    inner = nn.Module()
    inner.list = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    outer = nn.ModuleDict({"body": inner})
    inner.config = outer.config = config
    return outer


@pytest.mark.parametrize(
    "make", [Counted, SimpleNamespace, argparse.Namespace, dict, OrderedDict, type("Attributes", (dict,), {})]
)
def test_settings_of_every_kind_count_layers(make: Any) -> None:
    model = counting(make(num_layers=3, sizes=(3, 4)))
    small = remove_layers(model, [Block("body.list.0", 0, 0, True)])
    for net, number in ((small, 2), (model, 3)):
        for module in (net, net["body"]):
            assert settings_of(module.config) == {"num_layers": number, "sizes": (3, 4)}
            assert type(module.config) is make
    assert model["body"].config is model.config
    if make is not Counted:  # one for both
        assert small["body"].config is small.config


def test_what_is_shared_with_the_original_is_left_alone() -> None:
    model = counting(Single(num_layers=3))
    remove_layers(model, [Block("body.list.0", 0, 0, True)])
    assert model["body"].config.num_layers == 3


class TwoSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_layers = self.decoder_layers = 3
        self.depths = [1, 3]
        self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.decoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder[: self.encoder_layers]:
            x = layer(x)
        for layer in self.decoder[: self.decoder_layers]:
            x = layer(x)
        return x


def test_the_side_that_loses_layers_is_the_one_that_counts_fewer() -> None:
    model, x = TwoSides(), torch.randn(2, 4)
    small = remove_layers(model, [b for b in find_blocks(model, x) if b.module == "decoder.1"])
    assert (small.encoder_layers, small.decoder_layers, small.depths) == (3, 2, [1, 3])
    assert verify_layers(model, small, [Block("decoder.1", 0, 0, True)], x).passed


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4) for _ in range(n)]) for n in (3, 2, 3))
        self.depths = (3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return [x := layer(x) for blocks in self.stages for layer in blocks][-1]


def test_depths_per_stage() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depths = (3, 2, 3)
            self.layers = Staged()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    model, x = Model(), torch.randn(2, 4)
    small = remove_layers(model, [Block("layers.stages.2.0", 0, 0, True), Block("layers.stages.2.2", 0, 0, True)])
    assert [len(s) for s in small.layers.stages] == [3, 2, 1]
    torch.testing.assert_close(small(x), model.layers.stages[2][1](model_until(model, x, 5)))


def model_until(model: nn.Module, x: torch.Tensor, count: int) -> torch.Tensor:
    layers = [layer for stage in model.layers.stages for layer in stage]
    for layer in layers[:count]:
        x = layer(x)
    return x


def test_a_bypass_keeps_what_the_code_looks_at() -> None:
    model, tokens, _ = networks()["decoder"]
    block = Block("layers.1", 0, 2, False)
    small = remove_layers(model, [block])
    assert isinstance(small.layers[1], Bypass) and small.layers[1].kind == "sliding"
    assert verify_layers(model, small, [block], tokens).passed


def test_errors_leave_the_model_alone() -> None:
    model = Stages()
    with pytest.raises(GraphPruneError, match="stage9"):
        remove_layers(model, [Block("stage9.0", 0, 0, True)])
    with pytest.raises(GraphPruneError, match="no list"):
        remove_layers(model, [Block("stage1.0.conv1", 0, 0, True)])
    model.lock = (i for i in range(3))
    with pytest.raises(GraphPruneError, match="copied"):
        remove_layers(model, [Block("stage1.0", 0, 0, True)])
    assert len(model.stage1) == 3
