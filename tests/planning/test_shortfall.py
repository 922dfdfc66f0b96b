"""Where something was asked for and nothing came of it, that is said: by a warning, or an error where it is wanted."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Budget, GraphPruneError, GraphPruneWarning, sparsity
from graphprune.planning.shortfall import missed
from graphprune.plans.latency import Attempt

from ..runtimes.latency.law import table

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3)
    return nn.Sequential(*layers).eval()


class Literal(nn.Module):
    """All channels stay for a size that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 16, 6, 6))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


def blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.Linear(16, 3))


def said(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is GraphPruneWarning for w in caught)
    return [str(w.message) for w in caught]


CASES: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
    (network, X, 0.5, {"granularity": "heads"}, r"granularity='heads'.*only 2 groups of channels: choose"),
    (network, X, 0.5, {"granularity": ["qk features", "mlp"]}, r"granularity=\['qk features', 'mlp'\].*2 groups of ch"),
    (network, X, 0.5, {"round_to": 64}, r"round_to=64 leaves .*to 2 groups, the widest 0\.weight\[0\] of 16 chan"),
    (network, X, 0.5, {"min_channels": 99}, r"min_channels=99 keeps all of 2 groups, the widest .* of 16 channels: lo"),
    (network, X, 0.5, {"max_ratio": 0.01}, r"max_ratio=0\.01 allows no unit of 2 groups, .* of 16 channels to go: rai"),
    (network, X, 0.01, {}, r"ratio=0\.01 was asked for: the ratio is less than half a unit of 2 groups, .* raise it"),
    (
        network, X, 0.5, {"min_channels": 13, "round_to": 16},
        r"min_channels=13 keeps all of 1 group, .* of 12 channels: lower it; round_to=16|"
        r"round_to=16 .* of 16 channels: lower it; min_channels=13 keeps all of 1 group",
    ),
    (network, X, 0.5, {"ignore": "*"}, r"nothing of this network can go: \* is ignored, \d+ axes; .*graphprune\.doc"),
    (Literal, X, 0.5, {}, r"size 1 in view\(\) is the literal 16 \(test_shortfall\.py:\d+ in forward\), 3 axes; "),
    (network, X, {"5": 0.5}, {}, r"nothing was removed of '5' \(part of the model's output .*, 2 axes\)$"),
    (network, X, {"1": 0.5}, {}, r"nothing was removed of '1' \(its channels are made by 0\.weight: give that a "),
    (network, X, {"2": 0.5, "0": 0.5}, {}, r"nothing was removed of '2' \(it has no parameters with channels\)$"),
    (network, X, {"0": 0.5, "3": 0.01}, {}, r"removed of '3' \(the ratio is less than half a unit of 1 group, the wid"),
    (network, X, {"*": 0.5}, {"granularity": "heads"}, r"removed of '\*' \(granularity='heads', and these are chan"),
    (network, X, 0.5, {"granularity": "layer"}, r"granularity='layer': no layer can be left out"),
    (network, X, 0.5, {"granularity": "branch"}, r"granularity='branch': "),
    (network, X, 0.5, {"granularity": "experts"}, r"granularity='experts': no mixture of experts"),
    (blocks, torch.randn(2, 8), 0.1, {"granularity": "layer"}, r"the ratio of the layers that can go round to none"),
    (
        blocks, torch.randn(2, 8), 0.5, {"granularity": "layer", "max_ratio": 0.3},
        r"ratio and max_ratio=0\.3 of the layers that can go round to none",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "x", "ratio", "options", "message"), CASES)
def test_what_leaves_nothing_is_named(make: Any, x: Tensor, ratio: Any, options: Any, message: str) -> None:
    for call in (graphprune.plan, graphprune.prune):
        asked = functools.partial(call, make(), x, ratio, **options)
        with pytest.warns(GraphPruneWarning, match=message) as caught:
            asked()
        assert len(caught) == 1 and caught[0].filename == __file__, "once, at the line of the caller"
        with pytest.raises(GraphPruneError, match=message):
            asked(strict=True)


@pytest.mark.parametrize(
    ("make", "x", "ratio", "options"),
    [
        (network, X, 0.0, {}),
        (network, X, 0.0, {"granularity": "heads"}),
        (network, X, {"5": 0.0, "0": 0.5}, {}),
        (network, X, {"*": 0.5, "0": 0.25, "3": 0.25}, {}),
        (network, X, {"0": 0.5, "1": 0.5}, {}),
        (network, X, 0.5, {}),
        (network, X, None, {"budget": Budget(macs=0.5)}),
        (network, X, None, {"budget": Budget(macs=1.0)}),
        (network, X, None, {"budget": Budget(params=10**9)}),
        (blocks, torch.randn(2, 8), 0.0, {"granularity": "layer"}),
        (blocks, torch.randn(2, 8), 0.5, {"granularity": "layer"}),
        (blocks, torch.randn(2, 8), 0.5, {"granularity": "mlp"}),
    ],
)
def test_nothing_is_said_where_all_is_well(make: Any, x: Tensor, ratio: Any, options: Any) -> None:
    assert said(lambda: graphprune.prune(make(), x, ratio, strict=True, **options)) == []


def test_the_steps_of_a_target() -> None:
    target = graphprune.Target(table=table(64))
    with pytest.warns(GraphPruneWarning, match=r"round_to=64 leaves no narrower.*; 64 is what the target likes$"):
        assert graphprune.plan(network(), X, 0.5, target=target).empty
    assert said(lambda: graphprune.plan(network(), X, 0.5, target=graphprune.Target(table=table(4)))) == []


def test_what_looks_around_says_nothing() -> None:
    """doctor, advise, sensitivity and the steps of a schedule plan many prunings that remove nothing."""
    net = Literal()
    assert said(lambda: (graphprune.doctor(net, X), graphprune.sensitivity(net, X), graphprune.advise(net, X))) == []
    gradual = functools.partial(graphprune.prune_gradually, network(), X, 0.5, steps=20)
    assert said(gradual) == [], "the first of 20 steps asks for less than a channel"


def test_gradually() -> None:
    for options, message in (
        ({"round_to": 64}, "round_to=64"),
        ({"min_channels": 99}, "min_channels=99"),
        ({"ratio": 0.01}, "the ratio is less than half a unit"),
    ):
        asked = functools.partial(graphprune.prune_gradually, network(), X, **{"steps": 3, **options})  # type: ignore[arg-type]
        assert len(told := said(asked)) == 1 and message in told[0]
        with pytest.raises(GraphPruneError, match=message):
            asked(strict=True)
    with pytest.raises(GraphPruneError, match=r"no channels to remove \(granularity='heads'\)"):
        graphprune.prune_gradually(network(), X, 0.5, granularity="heads")


def test_a_scheduler_says_once_what_can_never_come() -> None:
    def run(**options: Any) -> None:
        method = sparsity.Channels(X, **options)
        scheduler = sparsity.Scheduler(network(), sparsity.schedule("linear", 0.0, 0.5, 10), method)
        for _ in range(10):
            scheduler.step()

    assert said(run) == []
    assert len(told := said(lambda: run(round_to=64))) == 1 and "round_to=64" in told[0]
    with pytest.raises(GraphPruneError, match="round_to=64"):
        run(round_to=64, strict=True)


class Head(nn.Module):
    """Class scores of a network of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"round_to": 64}}, "round_to=64"),
        ({"sparsity": 0.01}, "the ratio is less than half"),
        ({"sparsity": 0.01, "schedule": "linear", "prune_epochs": 2}, "the ratio is less than half"),
        ({"method": "layers"}, "no layer can be left out"),
    ],
)
def test_pipelines(options: dict[str, Any], message: str) -> None:
    data = [(X, torch.tensor([0, 1]))]
    asked = functools.partial(graphprune.pipeline, Head(), X, data, finetune_epochs=1, progress=False, **options)
    assert len(told := said(asked)) == 1 and message in told[0]
    with pytest.raises(GraphPruneError, match=message):
        asked(strict=True)


@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
def test_a_summary_says_what_was_asked_for_where_it_was_rounded() -> None:
    plan = graphprune.plan(network(), X, 0.4, round_to=8)
    assert [(g.size, g.asked, g.kept, g.rounded) for g in plan.groups] == [
        (16, pytest.approx(9.6), 8, True), (12, pytest.approx(7.2), 8, True),
    ]  # fmt: skip
    assert "0.weight[0]: 8 of 16 channels kept, 9.6 asked for" in str(plan)
    assert "asked for\n" not in str(graphprune.plan(network(), X, 0.5, round_to=1))
    held = graphprune.plan(network(), X, {"0": 0.5, "3": 0.5}, min_channels=12)
    assert "3.weight[0]: 12 of 12 channels kept, 6 asked for" in str(held)


@pytest.mark.parametrize(
    ("requested", "predicted", "measured", "told"),
    [(2.0, 1.9, 2.01, ""), (2.0, 1.9, 2.1, r"2.1 ms measured, 2 ms asked for .\+5.0%"),
     (2.0, 2.5, None, "2.5 ms predicted"), (2.0, 2.5, 1.9, ""), (2.0, 2.0, None, "")],
)  # fmt: skip
def test_a_missed_latency_is_said(requested: float, predicted: float, measured: float | None, told: str) -> None:
    plan = graphprune.plan(network(), X, 0.5)
    attempts = (Attempt(1.0, 9.0, 9.0), Attempt(requested, predicted, measured))
    found = missed(dataclasses.replace(plan, latency=graphprune.Latency(requested, 4.0, attempts, 1, {})))
    assert re.search(told, found) if told else found == ""
    assert missed(plan) == ""
