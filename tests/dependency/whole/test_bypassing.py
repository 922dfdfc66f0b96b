from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune.dependency.whole.blocks import find_blocks
from graphprune.dependency.whole.bypassing import changed
from graphprune.importance.calibration import CalibrationData
from graphprune.plans.verification import bypassed
from graphprune.tracing.example import ExampleInput


class Branch(nn.Module):
    """A residual layer; it may write into its input, before it reads it or at the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x.mul_(0.5) if self.kind == "first" else x * 0.5
        y = self.down(torch.tanh(self.up(x)))
        return (x.add_(y) if self.kind != "never" else x + y), None


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(Branch(kind) for _ in range(3))

    def forward(self, x: Tensor, skip: frozenset[int] = frozenset()) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            if i not in skip:
                x = layer(x)[0]
        out: Tensor = self.head(x)
        return out


def network(kind: str) -> Network:
    torch.manual_seed(0)
    return Network(kind).double().eval()


X, Y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("kind", ["first", "last", "never"])
def test_bypassed_is_skipped_also_where_layers_write_into_their_input(kind: str) -> None:
    model = network(kind)
    blocks = find_blocks(model, X)
    assert [b.module for b in blocks] == [f"layers.{i}" for i in range(3)]
    for k in (1, 2, 3):
        for gone in itertools.combinations(range(3), k):
            with bypassed(model, [blocks[i] for i in gone]):
                out = model(X)
            assert out.equal(model(X, frozenset(gone)))
            small = graphprune.plans.surgery.remove_layers(model, [blocks[i] for i in gone])
            assert graphprune.plans.verification.verify_layers(model, small, [blocks[i] for i in gone], X).passed


def test_a_change_sees_what_the_layer_was_given() -> None:
    model = network("first")
    given: list[Tensor] = []

    def look(x: Tensor, y: Tensor) -> Tensor:
        given.append(x)
        return y

    with changed(model, [(block, look) for block in find_blocks(model, X)]):
        out = model(X)
    assert out.equal(model(X))  # the hooks are gone, and changed nothing
    wanted = [model.stem(X)]
    for layer in model.layers:
        wanted.append(layer(wanted[-1].clone())[0])
    assert all(a.equal(b) for a, b in zip(given, wanted, strict=False)) and len(given) == 3


@pytest.mark.parametrize("criterion", ["block_influence", "taylor", "loss"])
def test_scores_do_not_depend_on_writing_in_place(criterion: str) -> None:
    found = []
    for kind in ("first", "last", "never"):
        model = network(kind)
        batches = CalibrationData([(X, Y)], ExampleInput.of(X), model)
        blocks = find_blocks(model, X)
        found.append(graphprune.importance.layers.layer_scores(model, blocks, criterion, batches, F.cross_entropy))
    assert found[0] == pytest.approx(found[2]) and found[1] == pytest.approx(found[2]) and min(map(abs, found[2])) > 0
