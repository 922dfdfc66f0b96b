"""What stays, against a slow reference that tries every set or sorts by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune
from graphprune import DependencyGraph, GraphPruneError
from graphprune.planning.allocation import allocate
from graphprune.planning.request import Request
from graphprune.planning.widths import settings_of

RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def chain(*widths: int) -> DependencyGraph:
    """One group of each width."""
    sizes = [3, *widths, 2]
    return graphprune.trace(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))), torch.randn(1, 3))


def removed(graph: DependencyGraph, scores: list[list[float]], **options: Any) -> list[list[int]]:
    given_scores = {i: np.asarray(s, float) for i, s in enumerate(scores)}
    found = allocate(graph, given_scores, settings_of(Request(**{"ratio": 0.5, "round_to": 1, **options}))).removed
    return [found[g.index].tolist() if g.index in found else [] for g in graph.groups]


def weakest(scores: list[float], count: int) -> list[int]:
    """The set of `count` units with the least total score; among equals the one with the higher indices."""
    sets = itertools.combinations(range(len(scores)), count)
    return list(min(sets, key=lambda s: (sum(Fraction(scores[i]) for i in s), [-i for i in reversed(s)])))


def wanted(ratio: float, size: int, round_to: int = 1, least: int = 1) -> int:
    """How many go, counted by trying: the multiple of `round_to` that is nearest to what the ratio leaves."""
    gone = max(n for n in range(size + 1) if n <= ratio * size + 0.5)  # halves go
    if gone == 0:
        return 0
    kept = size - gone
    if round_to > 1:
        options = range(round_to, size + round_to, round_to)
        kept = min(size, min(options, key=lambda k: (abs(k - kept), -k)))
    return size - max(kept, min(least, size))


@pytest.mark.parametrize(
    ("ratio", "size", "gone"),
    [(0.34, 10, 3), (0.35, 10, 4), (0.5, 3, 2), (0.5, 5, 3), (0.04, 10, 0), (0.05, 10, 1), (0.99, 10, 9), (0.0, 9, 0)],
)
def test_rounding_to_nearest(ratio: float, size: int, gone: int) -> None:
    assert len(removed(chain(size), [list(range(size))], ratio=ratio)[0]) == gone


@RELAXED
@given(
    scores=st.lists(st.integers(0, 4), min_size=2, max_size=9),
    ratio=st.floats(0, 0.999),
    round_to=st.integers(1, 5),
    least=st.integers(1, 4),
)
def test_local_against_every_set(scores: list[int], ratio: float, round_to: int, least: int) -> None:
    found = removed(chain(len(scores)), [scores], ratio=ratio, round_to=round_to, min_channels=least)
    assert found == [weakest(scores, wanted(ratio, len(scores), round_to, least))]


@RELAXED
@given(
    scores=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=6), min_size=2, max_size=3),
    ratio=st.floats(0, 0.9),
    least=st.integers(1, 3),
)
def test_global_is_one_ranking(scores: list[list[int]], ratio: float, least: int) -> None:
    graph = chain(*map(len, scores))
    flat = [(s, g, i) for g, group in enumerate(scores) for i, s in enumerate(group)]
    lost = sorted(flat)[: math.floor(ratio * len(flat) + 0.5)]  # equal scores: the first group, the lower index
    expected = []
    for g, group in enumerate(scores):
        count = min(sum(1 for _, owner, _ in lost if owner == g), len(group) - min(least, len(group)))
        expected.append(weakest(group, count))
    assert removed(graph, scores, ratio=ratio, scope="global", min_channels=least) == expected


def test_isomorphic_ranks_only_groups_of_one_structure() -> None:
    class Two(nn.Module):
        """Two blocks of one kind, and a convolution of another."""

        def __init__(self) -> None:
            super().__init__()
            self.a1, self.a2 = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 3, 1)
            self.b1, self.b2 = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 3, 1)
            self.c1, self.norm, self.c2 = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a2(self.a1(x))
            x = x + self.b2(self.b1(x))
            return x + self.c2(self.norm(self.c1(x)))

    graph = graphprune.trace(Two().eval(), torch.randn(1, 3, 4))
    assert [g.name for g in graph.groups] == ["a1.weight[0]", "b1.weight[0]", "c1.weight[0]"]
    scores = [[1, 2, 3, 4], [10, 20, 30, 40], [0.1, 0.2, 0.3, 0.4]]
    assert removed(graph, scores, scope="isomorphic") == [[0, 1, 2], [], [0, 1]]  # one stays in the first
    assert removed(graph, scores, scope="global") == [[0, 1], [], [0, 1, 2]]
    assert removed(graph, scores, scope="local") == [[0, 1]] * 3


def test_ties_keep_the_lower_index_and_later_layers() -> None:
    graph = chain(4, 4)
    assert removed(graph, [[1] * 4, [1] * 4]) == [[2, 3], [2, 3]]
    assert removed(graph, [[1] * 4, [1] * 4], scope="global", ratio=0.25) == [[2, 3], []]


def test_forced_counts_stay() -> None:
    graph = chain(6, 6)
    half = settings_of(Request(0.5, round_to=1))
    found = allocate(graph, {0: np.arange(6.0), 1: np.arange(6.0)}, half, {1: 5}).removed
    assert found[0].tolist() == [0, 1, 2] and found[1].tolist() == [0]


# -- equal counts


class Halves(nn.Module):
    """Two halves of one axis that a `chunk` tells apart: of each, equally many must stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2 * width), nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, -1)
        return self.b(left) + self.c(torch.relu(right))


@RELAXED
@given(
    halves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=5), ratio=st.floats(0, 0.9)
)
def test_halves_keep_equal_counts(halves: list[tuple[int, int]], ratio: float) -> None:
    width, scores = len(halves), [a for a, _ in halves] + [b for _, b in halves]
    graph = graphprune.trace(Halves(width), torch.randn(1, 3))
    by_unit = {
        g.index: np.asarray([scores[int(p)] for p in m.positions.reshape(-1)], float)
        for g in graph.groups
        for m in g.members
        if m.parameter == "a.weight"
    }
    gone = np.zeros(2 * width, bool)
    for g, units in allocate(graph, by_unit, settings_of(Request(ratio, round_to=1))).removed.items():
        member = next(m for m in graph.groups[g].members if m.parameter == "a.weight")
        gone[member.positions[units]] = True
    count = wanted(ratio, width)
    for half in (slice(0, width), slice(width, None)):
        assert np.nonzero(gone[half])[0].tolist() == weakest(scores[half], count)


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_of_a_group_norm_stay_equal_under_a_global_ranking(groups: int) -> None:
    model = nn.Sequential(nn.Linear(3, 12), nn.GroupNorm(groups, 12), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(1, 13).view(-1, 1))  # all the weak ones lie in the first group
    for ratio in (0.2, 0.4, 0.6):
        plan = graphprune.plan(model, torch.randn(2, 3), ratio, scope="global", round_to=1)
        kept = np.setdiff1d(np.arange(12), plan.removed["0.weight"][0])
        counts = np.bincount(kept // (12 // groups), minlength=groups)
        assert len(set(counts.tolist())) == 1 and counts[0] >= 1
        best = nearest_equal(12, groups, ratio)
        assert int(counts.sum()) in best


def nearest_equal(size: int, groups: int, ratio: float) -> set[int]:
    """The multiples of `groups` that are nearest to what the ratio leaves."""
    target = size - math.floor(ratio * size + 0.5)
    distance = {k: abs(k - target) for k in range(groups, size + 1, groups)}
    return {k for k, d in distance.items() if d == min(distance.values())}


# -- which groups are spoken of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(x))))


def kept(ratio: float | Mapping[str, float], **options: Any) -> tuple[int, int, int]:
    small = graphprune.prune(Net(), torch.randn(2, 3), ratio, verify=False, **options)
    return small.stem.out_features, small.body[0].out_features, small.body[2].out_features


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.5, (4, 4, 4)),
        ({"*": 0.5}, (4, 4, 4)),
        ({"stem": 0.5}, (4, 8, 8)),
        ({"stem.weight": 0.5}, (4, 8, 8)),
        ({"body": 0.5}, (8, 4, 4)),
        ({"body.*": 0.25}, (8, 6, 6)),
        ({"body": 0.25, "body.2": 0.75}, (8, 6, 2)),
        ({"body.2": 0.75, "body": 0.25}, (8, 6, 2)),
        ({"*": 0.5, "stem": 0.0}, (8, 4, 4)),
        ({"head": 0.5}, (8, 8, 8)),  # its outputs are the network's
    ],
)
def test_ratios_by_name(ratio: Any, expected: tuple[int, int, int]) -> None:
    assert kept(ratio) == expected


@pytest.mark.parametrize(
    "ignore", ["body.0", "body.0.weight", ["body.0"], "*.0", lambda m: m.body[0], lambda m: [m.body[0]]]
)
def test_ignored_outputs_stay(ignore: Any) -> None:
    model = Net()
    chosen = ignore(model) if callable(ignore) else ignore
    plan = graphprune.plan(model, torch.randn(2, 3), 0.5, ignore=chosen)
    small = plan.apply(model)
    assert (small.stem.out_features, small.body[0].out_features, small.body[2].out_features) == (4, 8, 4)
    assert any("body.0" in line and "ignored" in line for line in plan.frozen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": {"stm": 0.5}}, "ratio: no module or parameter matches 'stm'; did you mean 'stem'"),
        ({"ratio": {"stem": 1.0}}, r"ratio\['stem'\]: expected a number in \[0, 1\)"),
        ({"ratio": {}}, "ratio: the dict is empty"),
        ({"ignore": "bdy"}, "ignore: no module or parameter matches 'bdy'; did you mean 'body'"),
        ({"ignore": [3]}, "ignore: expected modules, parameters, names or patterns, got int"),
        ({"ignore": nn.Linear(2, 2)}, "ignore: Linear is no module of this model"),
        ({"granularity": "rows"}, "unknown granularity 'rows'"),
        ({"scope": "everywhere"}, "scope: expected one of 'local', 'global', 'isomorphic', got 'everywhere'"),
        ({"round_to": 0}, r'round_to: expected "auto" or an integer of at least 1, got 0'),
        ({"round_to": 2.0}, r'round_to: expected "auto" or an integer'),
        ({"min_channels": True}, "min_channels: expected an integer"),
    ],
)
def test_bad_requests_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        graphprune.plan(Net(), torch.randn(2, 3), **options)


class Heads(nn.Module):
    """Four heads of six features, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.features = 4, 6
        self.q, self.k, self.v = (nn.Linear(8, 24) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(24, 8), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.features).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.heads * self.features)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("auto", (2, 6, 5)),
        ("heads", (2, 6, 10)),
        ("head features", (4, 3, 10)),
        ("channels", (4, 6, 5)),
        ("mlp", (4, 6, 5)),
        (["qk features", "v features"], (4, 3, 10)),
        (["heads", "channels"], (2, 6, 5)),
        (("head", "head_feature", "channel"), (2, 3, 5)),
    ],
)
def test_granularity(granularity: Any, expected: tuple[int, int, int]) -> None:
    small = graphprune.prune(Heads(), torch.randn(2, 5, 8), 0.5, granularity=granularity, round_to=1)
    assert (small.heads, small.features, small.up.out_features) == expected
    assert small.q.out_features == small.v.out_features == small.out.in_features == expected[0] * expected[1]


def test_seed_decides_what_random_removes_and_nothing_else() -> None:
    model, x = Net(), torch.randn(2, 3)

    def choose(**options: Any) -> Any:
        return graphprune.plan(model, x, 0.5, **options).removed

    assert choose(criterion="random", seed=1) == choose(criterion="random", seed=1)
    assert choose(criterion="random", seed=1) != choose(criterion="random", seed=2)
    assert choose(criterion="l2", seed=1) == choose(criterion="l2", seed=2)
