"""What only training runs is pruned along; a model that cannot train without targets is recorded as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.tracing.trace import record_run


class Auxiliary(nn.Module):
    """A second head that reads the middle of the trunk in training mode, as GoogLeNet's do."""

    def __init__(self, dropout: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.trunk, self.head = nn.Conv2d(8, 12, 3), nn.Linear(12, 5)
        self.side, self.auxiliary = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Any:
        middle = F.relu(self.norm(self.stem(x)), inplace=True)
        if self.dropout:
            middle = F.dropout(middle, 0.5, self.training)
        out = self.head(F.relu(self.trunk(middle)).mean((2, 3)))
        if self.training:
            return out, self.auxiliary(self.side(middle).mean((2, 3)))
        return out


class WantsTargets(Auxiliary):
    """A detector's manner."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets should not be none in training mode")
        return super().forward(x)


class Unread(Auxiliary):
    """The second head is never run at all."""

    def forward(self, x: Tensor) -> Any:
        middle = F.relu(self.norm(self.stem(x)))
        return self.head(self.trunk(middle * (2.0 if self.training else 1.0)).mean((2, 3)))


def image() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dropout", [False, True])
def test_an_auxiliary_head_follows_the_trunk(dropout: bool) -> None:
    model = Auxiliary(dropout).eval()
    small = graphprune.prune(model, image(), 0.5, fold_bn=False)
    assert small.side.weight.shape == (3, 4, 1, 1)  # both of its widths, and its head's inputs
    assert small.auxiliary.weight.shape == (5, 3)
    out, auxiliary = small.train()(image())
    assert out.shape == auxiliary.shape == (2, 5)
    (out.sum() + auxiliary.sum()).backward()
    assert small.side.weight.grad is not None and bool(small.side.weight.grad.any())


def test_the_auxiliary_heads_output_stays_and_the_batch_norm_is_folded() -> None:
    plan = graphprune.plan(Auxiliary().eval(), image(), 0.5)
    assert 0 not in plan.removed["auxiliary.weight"]
    assert [fold.batch_norm for fold in plan.folds] == ["norm"]


def test_calls_of_both_runs_are_recorded_once() -> None:
    model = Auxiliary().eval()
    once, twice = record_run(model, image()), record_run(model, image(), training_paths=True)
    names = [str(n.target) for n in once.graph.nodes if n.op == "call_function"]
    more = [str(n.target) for n in twice.graph.nodes if n.op == "call_function"]
    assert more[: len(names)] == names
    assert more[len(names) :] == ["aten.convolution.default", "aten.mean.dim", "aten.linear.default"]
    assert (once.outputs, twice.outputs) == (1, 1)
    twice.graph.lint()


class Lists(nn.Module):
    """Sizes of parts leave torch as a list, which training makes in another way."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = torch.full((3,), 3)
        return torch.cat(x.split((sizes * 1 if self.training else sizes).tolist(), 3)[::-1], 3)


NOTHING_MORE = [
    WantsTargets(), Unread(), nn.Sequential(Lists(), nn.Conv2d(3, 4, 1)),
    nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
]  # fmt: skip


@pytest.mark.parametrize("model", NOTHING_MORE)
def test_a_second_run_that_adds_nothing_leaves_the_graph_alone(model: nn.Module) -> None:
    model.train()
    once, twice = record_run(model, image()), record_run(model, image(), training_paths=True)
    twice.graph.lint()
    assert [n.format_node() for n in twice.graph.nodes] == [n.format_node() for n in once.graph.nodes]
    assert twice.guards == once.guards and twice.parameters.keys() == once.parameters.keys()
    assert all(module.training for module in model.modules())


def test_counting_is_of_eval_mode() -> None:
    model = Auxiliary().eval()
    assert graphprune.count(model, image()).macs == 2 * (7 * 7 * 8 * 27 + 5 * 5 * 12 * 72 + 12 * 5)
