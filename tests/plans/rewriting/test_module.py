"""A replaced module stays what it was to the code around it: its class, methods, properties and contents."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.plans.rewriting import RewrittenModule
from tests import oracles
from tests.plans.rewriting.literal_nets import Block


class Known(Block):
    """A block with a method, a property and a class attribute that others use, and a constructor with arguments."""

    strength = 3

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    @property
    def device(self) -> torch.device:
        return self.a.weight.device

    def after(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.factor


class ByClass(nn.Module):
    """Code that asks for the class of its children, and calls more than their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 8), Known(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for child in self.children():
            if isinstance(child, Block):
                y = child.after(child(y)).to(child.device) * child.strength
        return self.head(y)


@pytest.fixture
def pruned() -> tuple[nn.Module, Tensor, graphprune.Plan, nn.Module]:
    torch.manual_seed(0)
    model, example = ByClass().double(), torch.randn(5, 4).double()
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    return model, example, plan, plan.apply(model)


def test_class_methods_and_properties(pruned: tuple[nn.Module, Tensor, graphprune.Plan, nn.Module]) -> None:
    model, example, plan, small = pruned
    assert [r.module for r in plan.rewrites] == ["block"]
    assert isinstance(small.block, RewrittenModule)
    assert isinstance(small.block, Known)
    assert type(small.block).__name__ == "Known"
    assert small.block.a.out_features < 12
    want = oracles.zero_reference(model, plan.removed)(example)
    assert oracles.relative_error(small(example), want) < 1e-9
    assert oracles.relative_error(small(torch.cat([example, example])), torch.cat([want, want])) < 1e-9


def test_copies_keep_the_class(pruned: tuple[nn.Module, Tensor, graphprune.Plan, nn.Module]) -> None:
    _, example, _, small = pruned
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(small), copy.copy(small), torch.load(buffer, weights_only=False)):
        assert isinstance(other.block, Known)
        assert oracles.relative_error(other(example), small(example)) == 0


def test_pruned_again(pruned: tuple[nn.Module, Tensor, graphprune.Plan, nn.Module]) -> None:
    """A rewritten module is code like any other, with the pruned sizes as literals."""
    _, example, _, small = pruned
    plan = graphprune.plan(small, example, 0.5, output="hybrid")
    assert [r.module for r in plan.rewrites] == ["block"]
    smaller = plan.apply(small)
    assert isinstance(smaller.block, Known)
    assert smaller.block.a.out_features < small.block.a.out_features
    want = oracles.zero_reference(small, plan.removed)(example)
    assert oracles.relative_error(smaller(example), want) < 1e-9
