from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from graphprune.dependency.whole.blocks import Block, find_blocks
from tests.layered_networks import networks


@pytest.mark.parametrize("name", networks())
def test_layers_that_can_go(name: str) -> None:
    model, example, expected = networks()[name]
    assert [b.module for b in find_blocks(model, example)] == expected


def test_how_the_stream_is_passed() -> None:
    model, example, _ = networks()["attributes"]
    assert find_blocks(model, example)[2] == Block("third", "x", 0, False)
    model, example, _ = networks()["decoder"]
    assert find_blocks(model, example)[0] == Block("layers.0", 0, 2, True)


def test_a_layer_that_runs_twice_stays() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.Linear(6, 6))
    assert [b.module for b in find_blocks(model, torch.randn(2, 4))] == ["4"]


def test_nothing_of_the_model_changes() -> None:
    model, example, _ = networks()["decoder"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    find_blocks(model, example)
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_errors() -> None:
    with pytest.raises(graphprune.GraphPruneError, match=r"nn\.Module"):
        find_blocks(lambda x: x, torch.randn(1))  # type: ignore[arg-type]
    with pytest.raises(graphprune.GraphPruneError, match="shape"):
        find_blocks(nn.Linear(3, 3), torch.randn(2, 4))
