"""Two sides of a layer that a configuration states in one number: tied one by one, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune

TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


class Pooler(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x[:, 0]).tanh()
        return out


class Head(nn.Module):
    """The same by arguments: whoever makes it says whether they are one number."""

    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(inside, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.dense(x).relu())
        return out


class Model(nn.Module):
    """A stream of `hidden`, an MLP whose `inner` is as wide, a pooler, and a head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(11, config.hidden)
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)
        self.pooler, self.head = Pooler(config), self._head(config)

    def _head(self, config: Any) -> nn.Module:
        return Head(config.hidden, config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(self.up(x).relu())
        out: Tensor = self.head(self.pooler(x))
        return out


class TwoNumbers(Model):
    def _head(self, config: Any) -> nn.Module:
        return Head(config.hidden, config.head)


def made(kind: type[Model] = Model, configured: bool = True) -> Model:
    torch.manual_seed(0)
    model = kind(SimpleNamespace(hidden=8, inner=8, head=8)).eval()
    if not configured:
        del model.config
    return model


def together(graph: graphprune.DependencyGraph) -> list[set[str]]:
    """The produced axes of each group."""
    return [{m.parameter for m in g.members if m.role == "out" and m.axis == 0} for g in graph.groups]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, [{"down.weight", "pooler.dense.weight", "head.dense.weight"}, {"up.weight"}]),
        ({"kind": TwoNumbers}, [{"down.weight", "pooler.dense.weight"}, {"up.weight"}, {"head.dense.weight"}]),
        ({"configured": False}, [{"down.weight"}, {"up.weight"}, {"pooler.dense.weight"}, {"head.dense.weight"}]),
    ],
)
def test_what_one_number_states_goes_together(options: dict[str, Any], groups: list[set[str]]) -> None:
    model = made(**options)
    graph = graphprune.trace(model, TOKENS)
    found = together(graph)
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))
    small = graphprune.prune(model, TOKENS, 0.5, round_to=1)
    assert small.table.embedding_dim == small.pooler.dense.in_features == 4
    stays = graphprune.prune(model, TOKENS, 0.5, granularity="mlp", round_to=1)
    assert (stays.pooler.dense.out_features == 8) == options.get("configured", True)


def test_each_index_goes_with_the_one_of_the_same_number() -> None:
    graph = graphprune.trace(made(), TOKENS)
    group = next(g for g in graph.groups if len(g.members) > 6)
    at = {(m.parameter, m.axis): m.positions[:, 0] for m in group.members}
    for name in ("pooler.dense.weight", "head.dense.weight"):
        assert np.array_equal(at[name, 0], at[name, 1])
        assert np.array_equal(at[name, 0], at["table.weight", 1])


@pytest.mark.parametrize("seed", range(6))
def test_tying_is_one_search_for_components(seed: int) -> None:
    """`Analysis.tying` beside a search over all positions."""
    random = np.random.default_rng(seed)
    analysis = graphprune.trace(made(configured=False), TOKENS).analysis
    total = len(analysis.tied)
    pairs = [(random.integers(1, total, 4), random.integers(1, total, 4)) for _ in range(3)]
    found = analysis.tying(pairs)
    for before, after in ((analysis.tied, found.tied), (analysis.label, found.label)):
        expected = before.copy()
        for a, b in pairs:
            for i, j in zip(a, b, strict=True):
                one, other = expected[i], expected[j]
                expected[(expected == one) | (expected == other)] = min(one, other)
        same = after[:, None] == after[None, :]
        assert np.array_equal(same, expected[:, None] == expected[None, :])
        assert after[0] == before[0]
    free = found.label != found.label[0]
    assert np.array_equal(found.label[free], found.tied[free]), "what can go has one number, frozen or not"


def test_nothing_to_tie_is_the_same_analysis() -> None:
    analysis = graphprune.trace(made(configured=False), TOKENS).analysis
    assert analysis.tying(()) is analysis
