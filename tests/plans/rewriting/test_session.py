"""Which modules are replaced: those without whose rewriting something would have to stay, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests.plans.rewriting.literal_nets import Block


class Attention(nn.Module):
    """Literals (the 3 of q, k and v and its indices) that pruning leaves alone; what changes are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.qkv, self.out = nn.Linear(8, 72), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q @ k.transpose(-2, -1)) * self.width**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


class Tokens(nn.Module):
    """stem -> attention -> blocks with literals -> head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(4, 8), Attention(), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.attention(y)
        for block in self.blocks:
            y = block(y.flatten(0, 1)).view_as(y)
        return self.head(y)


def test_a_module_whose_own_code_gets_every_size_right_is_left_alone() -> None:
    torch.manual_seed(0)
    model, example = Tokens(0), torch.randn(2, 5, 4)
    kept = graphprune.plan(model, example, 0.5, granularity=["channels", "heads"])
    plan = graphprune.plan(model, example, 0.5, granularity=["channels", "heads"], output="hybrid")
    assert plan.removed == kept.removed
    assert plan.removed["attention.qkv.weight"]
    assert not plan.rewrites
    assert [(c.name, c.new) for c in plan.attributes] == [("heads", 2)]


def test_beside_a_module_that_needs_it_the_others_are_left_alone() -> None:
    torch.manual_seed(0)
    model, example = Tokens(2), torch.randn(2, 5, 4)
    plan = graphprune.plan(model, example, 0.5, output="hybrid", ignore=["blocks.0.a"])
    assert [r.module for r in plan.rewrites] == ["blocks.1"]
    small = plan.apply(model)
    assert type(small.attention) is Attention
    assert type(small.blocks[0]) is Block
    assert graphprune.verify(model, small, plan, example).passed


def test_what_only_training_does_refuses_that_module_alone() -> None:
    class Noisy(Block):
        def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
            y = super().forward(x, scale)
            return y + torch.randn_like(y) if self.training else y

    torch.manual_seed(0)
    model, example = Tokens(2), torch.randn(2, 5, 4)
    model.blocks[0] = Noisy()
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    assert [r.module for r in plan.rewrites] == ["blocks.1"]
    assert any("does something else in training mode" in line for line in plan.frozen)


@pytest.mark.parametrize("granularity", ["heads", "head features"])
def test_other_granularities(granularity: str) -> None:
    torch.manual_seed(0)
    model, example = Tokens(1), torch.randn(2, 5, 4)
    plan = graphprune.plan(model, example, 0.5, granularity=granularity, output="hybrid")
    assert plan.removed
    small = plan.apply(model)
    assert graphprune.verify(model, small, plan, example).passed
    assert small(torch.randn(3, 7, 4)).shape == (3, 7, 3)


def test_a_name_that_graph_modules_need_is_refused() -> None:
    class Named(Block):
        def graph(self) -> str:
            return "the block's own"

    model, example = Tokens(1), torch.randn(2, 5, 4)
    model.blocks[0] = Named()
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    assert not plan.rewrites
    assert any("uses self.graph, a name that torch.fx.GraphModule has for itself" in line for line in plan.frozen)


def test_runs_do_not_grow_with_the_number_of_blocks() -> None:
    def runs(blocks: int) -> int:
        seen: list[int] = []
        model = Tokens(blocks)
        model.register_forward_pre_hook(lambda *_: seen.append(1))
        assert len(graphprune.plan(model, torch.randn(2, 5, 4), 0.5, output="hybrid").rewrites) == blocks
        return len(seen)

    assert runs(1) == runs(6)


def test_layers_that_only_training_runs_are_cut_too() -> None:
    class Auxiliary(Tokens):
        def __init__(self) -> None:
            super().__init__(0)
            self.extra = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(y) + self.extra(y) if self.training else self.head(y)

    small = graphprune.prune(Auxiliary(), torch.randn(2, 5, 4), 0.5, output="hybrid")
    assert small.extra.in_features == small.head.in_features == 4
    assert small.train()(torch.randn(2, 5, 4)).shape == (2, 5, 3)
