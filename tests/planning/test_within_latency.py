"""Plans within a latency budget, on a machine whose law is known and which the table does not know all of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune import Budget, GraphPruneError, Target
from graphprune.planning.within_latency import aimed
from graphprune.runtimes.latency import LatencyTable, chains, meters, networks
from graphprune.runtimes.latency.forecast import Forecast, measured_context

from ..runtimes.latency.law import net, planned, run_of, seconds_of, table


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("growth", [1.0, 0.85, 1.2])
def test_the_budget_is_met_although_the_machine_differs(
    monkeypatch: pytest.MonkeyPatch, fraction: float, growth: float
) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, 1, growth, budget=Budget(latency=fraction))
    reached = (seconds_of(plan.apply(model), x) / seconds_of(model, x)) ** growth
    assert 0.75 * fraction <= reached <= fraction * 1.004  # units are few and large: four heads of eight features
    assert plan.latency is not None and plan.latency.measured_ms is not None
    assert plan.latency.measured_ms / plan.latency.dense_ms == pytest.approx(reached)
    graphprune.verify(model, plan.apply(model), plan, x).raise_on_failure()


def test_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    dense = 1e3 * seconds_of(model, x)
    plan = planned(monkeypatch, model, x, budget=Budget(latency_ms=0.6 * dense))
    assert plan.latency.requested_ms == pytest.approx(0.6 * dense)
    assert 1e3 * seconds_of(plan.apply(model), x) <= 0.6 * dense


def test_widths_lie_on_the_stairs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]).eval()
    plan = planned(monkeypatch, model, torch.randn(1, 64, 6, 6), 16, budget=Budget(latency=0.5))
    assert {g.kept % 16 for g in plan.groups} == {0} and any(g.kept < g.size for g in plan.groups)


def test_several_budgets_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, 1, budget=Budget(latency=0.7, params=0.4))
    small = plan.apply(model)
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())
    assert seconds_of(small, x) <= 0.7 * seconds_of(model, x)


def test_max_ratio_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, 1, budget=Budget(latency=0.6), max_ratio=0.5)
    assert all(g.kept >= g.size * 0.5 for g in plan.groups)


def table_for(model: nn.Module, x: torch.Tensor) -> LatencyTable:
    """A table that holds everything that planning for this model looks up."""
    made = table()
    graph = graphprune.trace(model, x)
    context = measured_context(graph, made, run_of(model, x))
    Forecast(made, context).cost(graph)
    made.contexts[graphprune.plan(model, x, 0.5).structural_hash] = context
    return made


def test_an_impossible_budget_says_what_was_predicted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    with pytest.raises(GraphPruneError, match=r"latency cannot be .* expected to take .* took .* raise the budget"):
        planned(monkeypatch, model, x, budget=Budget(latency=0.001))


def test_with_a_table_alone_an_impossible_budget_says_what_remains() -> None:
    model, x = net()
    made = table_for(model, x)
    with pytest.raises(GraphPruneError, match=r"latency.*remain.*raise the budget"):
        graphprune.plan(model, x, budget=Budget(latency=0.001), target=Target(table=made))


def test_a_table_that_expects_too_much_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is a good deal faster than foreseen: small ones take the third power of their share."""
    model, x = net()
    dense = seconds_of(model, x)
    least = min(
        seconds_of(planned(monkeypatch, model, x, budget=Budget(latency=f)).apply(model), x) / dense
        for f in (0.5, 0.3, 0.2)
    )
    fraction = 0.5 * least
    with pytest.raises(GraphPruneError, match="took"):
        planned(monkeypatch, model, x, budget=Budget(latency=0.3 * fraction), max_ratio=0.5)
    plan = planned(monkeypatch, model, x, 1, 3.0, budget=Budget(latency=fraction), max_ratio=0.5)
    reached = (seconds_of(plan.apply(model), x) / dense) ** 3
    assert reached <= fraction * 1.004
    assert all(g.kept >= 0.5 * g.size for g in plan.groups)


@pytest.mark.parametrize("seed", range(20))
def test_aiming_finds_the_request_on_any_rising_curve(seed: int) -> None:
    """Against bisection: measurements that are some rising function of the predictions."""
    rng = np.random.default_rng(seed)
    power, factor, jump = rng.uniform(0.5, 2.0), rng.uniform(0.7, 1.4), rng.uniform(0.2, 0.8)

    def measure(predicted: float) -> float:
        return float(factor * predicted**power + (0.1 if predicted > jump else 0.0))

    requested = float(rng.uniform(0.2, 0.9))
    predicted, measured = [requested], [measure(requested)]
    for _ in range(12):
        predicted.append(aimed(predicted, measured, requested))
        measured.append(measure(predicted[-1]))
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) <= requested else (low, middle)
    nearest = max(m for m in measured if m <= requested)
    assert nearest >= 0.95 * measure(low) - 0.001


def test_a_budget_that_is_met_already_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, budget=Budget(latency=1.0))
    assert plan.empty and plan.latency is not None


def test_the_record_is_stored_with_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = net()
    plan = planned(monkeypatch, model, x, budget=Budget(latency=0.5))
    back = graphprune.Plan.load(plan.save(tmp_path / "p.json"))
    assert back == plan and "predicted" in str(back) and "measured" in str(back)


CHANGES: list[dict[str, Any]] = [{"chosen": 9}, {"dense_ms": "x"}, {"dense_ms": -1}, {"attempts": [{}]}, {"about": 3}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_record_is_no_plan(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    model, x = net()
    data = planned(monkeypatch, model, x, budget=Budget(latency=0.5)).to_dict()
    data["latency"] = {**data["latency"], **change}
    with pytest.raises(GraphPruneError, match="not a plan"):
        graphprune.Plan.from_dict(data)


def test_a_table_from_another_machine(tmp_path: Path) -> None:
    model, x = net()
    made = table_for(model, x)
    path = made.save(tmp_path / "phone.json")
    plan = graphprune.plan(model, x, budget=Budget(latency=0.5), target=Target(table=path))
    assert plan.latency is not None and plan.latency.measured_ms is None
    assert seconds_of(plan.apply(model), x) <= 0.5 * seconds_of(model, x) * (1 + 1e-6)
    with pytest.raises(GraphPruneError, match="not made for this model"):
        graphprune.plan(nn.Linear(3, 4), torch.randn(1, 3), budget=Budget(latency=0.5), target=Target(table=path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"latency": 1.5}, "latency_ms"),
        ({"latency": 0}, "latency"),
        ({"latency_ms": -3}, "latency_ms"),
        ({"latency": 0.5, "latency_ms": 3}, "exclude"),
        ({"latency": True}, "latency"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"threads": True}, {"attempts": -1}, {"table": 3}])
def test_bad_targets(arguments: dict[str, Any]) -> None:
    with pytest.raises(GraphPruneError, match="target"):
        Target(**arguments)


@pytest.mark.parametrize("arguments", [{"ratio": 0.4}, {"budget": Budget(macs=0.8)}])
def test_with_a_ratio_a_target_gives_the_widths(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]).eval()
    x = torch.randn(1, 64, 6, 6)
    plan = graphprune.plan(model, x, target=Target(table=table(16)), **arguments)
    same = graphprune.plan(model, x, round_to=16, **arguments)
    assert plan.removed == same.removed and any(g.kept < g.size for g in plan.groups)
    both = graphprune.plan(model, x, target=Target(table=table(16)), round_to=24, **arguments)
    assert all(g.kept == g.size or g.kept % 48 == 0 for g in both.groups)


@pytest.mark.parametrize("granularity", ["layer", "experts"])
def test_a_target_has_no_say_in_what_goes_as_a_whole(granularity: str) -> None:
    with pytest.raises(GraphPruneError, match="chooses widths"):
        graphprune.plan(*net(), 0.5, target=Target(), granularity=granularity)


def test_milliseconds_cannot_be_approached_in_steps() -> None:
    with pytest.raises(GraphPruneError, match="latency_ms cannot be approached in steps"):
        graphprune.prune_gradually(*net(), budget=Budget(latency_ms=0.5), train=lambda m, s: None)


def test_a_target_must_be_one() -> None:
    with pytest.raises(GraphPruneError, match=r"graphprune\.Target"):
        graphprune.plan(nn.Linear(3, 4), torch.randn(1, 3), budget=Budget(latency=0.5), target="cpu")  # type: ignore[arg-type]


def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, small and in few rounds: what is measured is recorded, and measured times are used again."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    for room, rounds in ((meters, 2), (chains, 2), (networks, 4)):
        monkeypatch.setattr(room, "_ROUNDS", rounds)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    x = torch.randn(1, 3, 24, 24)
    target = Target(provider="cpu", attempts=2)
    small = graphprune.prune(model, x, budget=Budget(latency=0.7), target=target)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    (stored,) = (tmp_path / "graphprune").glob("latency-*.json")
    before = stored.read_text()
    made = graphprune.latency_table(model, x, target)
    assert stored.read_text() == before and made.contexts
    plan = graphprune.plan(model, x, budget=Budget(latency=0.7), target=Target(table=made))
    assert plan.latency is not None and plan.latency.about["provider"] == "CPUExecutionProvider"
