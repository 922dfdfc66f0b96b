"""Latency budgets for layers and widths together, on the machine whose law is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune import Budget, GraphPruneError, Target
from graphprune.dependency.whole.blocks import find_blocks
from graphprune.plans.surgery import bypass_layers, remove_layers
from graphprune.runtimes.latency.costs import LatencyCosts
from graphprune.runtimes.latency.forecast import Forecast, measured_context
from graphprune.runtimes.latency.shorter import ShorterForecast
from tests.layered_networks import Residual

from ..runtimes.latency.law import net, planned, run_of, seconds_of, table


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(Residual(16) for _ in range(5))
        self.narrow, self.head = nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.narrow(x)).mean((2, 3)))


def deep() -> tuple[nn.Module, torch.Tensor]:
    return Deep().eval(), torch.randn(1, 3, 8, 8)


@pytest.mark.parametrize("overhead", [1.0, 1.7])
@pytest.mark.parametrize("gone", [0, 1, 3])
def test_the_forecast_without_layers_is_what_they_take(gone: int, overhead: float) -> None:
    """Computations alone, and all of them slower by the same factor than the table says."""
    model, x = deep()
    made, graph = table(), graphprune.trace(model, x)
    forecast = Forecast(made, measured_context(graph, made, run_of(model, x, overhead=overhead)))
    blocks = find_blocks(model, x)[:gone]
    cost = ShorterForecast(forecast, graph).cost(graphprune.trace(bypass_layers(model, blocks), x))
    assert cost.full == pytest.approx(seconds_of(remove_layers(model, blocks), x, overhead=overhead), rel=1e-6)
    assert ShorterForecast(forecast, graph).dense == pytest.approx(seconds_of(model, x, overhead=overhead))


def test_elements_and_calls_shrink_in_proportion() -> None:
    model, x = deep()
    made, graph = table(), graphprune.trace(model, x)
    run = run_of(model, x)
    light = type(run.nodes[0])("relu", "Relu", ((1,),), ((1,),), 3e-5)
    waits = 4e-6 * (len(run.nodes) + 1)  # twice what calling so many nodes takes
    full = type(run)((*run.nodes, light), run.wall + 3e-5 + waits)
    context = measured_context(graph, made, full)
    forecast = Forecast(made, context)
    whole = LatencyCosts(graph, made, context)
    assert whole.full == pytest.approx(full.wall)
    for gone in (1, 3):
        small = bypass_layers(model, find_blocks(model, x)[:gone])
        part = ShorterForecast(forecast, graph).cost(graphprune.trace(small, x))
        one = whole.full - without_one(forecast, model, x)
        assert one > 0 and whole.full - part.full == pytest.approx(gone * one, 1e-6)


def without_one(forecast: Forecast, model: nn.Module, x: torch.Tensor) -> float:
    """Without one layer: all are alike."""
    small = bypass_layers(model, find_blocks(model, x)[:1])
    return ShorterForecast(forecast, graphprune.trace(model, x)).cost(graphprune.trace(small, x)).full


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("fraction", [0.7, 0.45, 0.3])
@pytest.mark.parametrize("growth", [1.0, 0.9])
def test_budgets_of_time(monkeypatch: pytest.MonkeyPatch, step: int, fraction: float, growth: float) -> None:
    model, x = deep()
    plan = planned(monkeypatch, model, x, step, growth, budget=Budget(latency=fraction), granularity=["layer", "auto"])
    small = plan.apply(model)
    reached = (seconds_of(small, x, step) / seconds_of(model, x, step)) ** growth
    assert reached <= fraction * 1.004
    assert plan.latency is not None and plan.latency.measured_ms is not None
    assert plan.latency.measured_ms / plan.latency.dense_ms == pytest.approx(reached)
    graphprune.verify(model, small, plan, x).raise_on_failure()
    if step == 16:  # sixteen channels are one step: there is nothing to gain but by layers
        assert len(plan.layers) >= np.ceil(5 * (1 - fraction / 0.95)) and len(small.layers) == 5 - len(plan.layers)


def test_time_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep()
    budget = Budget(latency=0.6, params=0.4)
    plan = planned(monkeypatch, model, x, 1, budget=budget, granularity=["layer", "channels"])
    small = plan.apply(model)
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())
    assert seconds_of(small, x) <= 0.6 * seconds_of(model, x)


def test_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, budget=Budget(latency=0.6), granularity=["branch", "channels"])
    assert seconds_of(plan.apply(model), x) <= 0.6 * seconds_of(model, x)


def test_a_table_from_another_machine(tmp_path: Path) -> None:
    model, x = deep()
    made, graph = table(), graphprune.trace(model, x)
    made.contexts[graphprune.plan(model, x, 0.5).structural_hash] = measured_context(graph, made, run_of(model, x))
    Forecast(made, next(iter(made.contexts.values()))).cost(graph)
    path = made.save(tmp_path / "phone.json")
    plan = graphprune.plan(
        model, x, budget=Budget(latency=0.5), target=Target(table=path), granularity=["layer", "channels"]
    )
    assert plan.latency is not None and plan.latency.measured_ms is None
    assert seconds_of(plan.apply(model), x) <= 0.5 * seconds_of(model, x) * (1 + 1e-6)


def test_a_target_without_a_latency_budget_gives_the_widths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]).eval()
    x = torch.randn(1, 64, 6, 6)
    options = {"budget": Budget(macs=0.6), "granularity": ["layer", "channels"], "max_ratio": 0.7}
    plan = graphprune.plan(model, x, target=Target(table=table(16)), **options)
    same = graphprune.plan(model, x, round_to=16, **options)
    assert (plan.removed, plan.layers) == (same.removed, same.layers) and plan.removed
    assert {g.kept % 16 for g in plan.groups} == {0}


def test_an_impossible_budget_says_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep()
    with pytest.raises(GraphPruneError, match=r"latency cannot be brought.*measured; raise the budget"):
        planned(monkeypatch, model, x, budget=Budget(latency=0.001), granularity=["layer", "channels"])
