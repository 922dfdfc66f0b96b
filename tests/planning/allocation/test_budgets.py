"""Budgets by name: registered, found, refused with a hint, and planned with."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphprune
from graphprune import Budget, GraphPruneError
from graphprune.cli import app
from graphprune.dependency import DependencyGraph
from graphprune.dependency.axes import ProductCosts, axes_of
from graphprune.planning.allocation import BUDGETS, budget_kind
from graphprune.tracing.names import operator_name

X = torch.randn(5, 3)

OWN = '''
import torch
from torch import nn
from graphprune.dependency.axes import ProductCosts, axes_of
from graphprune.planning.allocation import budget_kind
from graphprune.tracing.names import operator_name

@budget_kind("activations_of_own")
def activations(graph, model, folds):
    costs = ProductCosts(graph)
    for node in graph.trace.graph.nodes:
        if operator_name(node) == "linear":
            costs.add(1, axes_of(graph, node))
    return costs

def make():
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 2))
'''


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 2)).eval()


def outputs(model: nn.Module) -> int:
    """Elements of the results of all linear layers, by hooks."""
    found: list[int] = []
    held = [
        m.register_forward_hook(lambda _m, _i, out: found.append(out.numel()))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    model(X)
    for handle in held:
        handle.remove()
    return sum(found)


@pytest.fixture
def activations() -> Iterator[str]:
    @budget_kind("activations")
    def activations(graph: DependencyGraph, model: nn.Module, folds: Sequence[Any]) -> ProductCosts:
        costs = ProductCosts(graph)
        for node in graph.trace.graph.nodes:
            if operator_name(node) == "linear":
                costs.add(1, axes_of(graph, node))
        return costs

    yield "activations"
    BUDGETS.remove("activations")


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_a_registered_budget_is_met(activations: str, share: float) -> None:
    model = net()
    small = graphprune.prune(model, X, budget=Budget(**{activations: share}))
    assert 0.97 * share <= outputs(small) / outputs(model) <= share
    counted = graphprune.prune(model, X, budget=Budget(**{activations: share * outputs(model)}))
    assert 0.97 * share <= outputs(counted) / outputs(model) <= share


def test_a_registered_budget_goes_with_others(activations: str) -> None:
    model = net()
    small = graphprune.prune(model, X, budget=Budget(macs=0.3, **{activations: 0.9}))
    assert outputs(small) <= 0.9 * outputs(model)
    assert graphprune.count(small, X).macs <= 0.3 * graphprune.count(model, X).macs


def test_a_registered_budget_that_cannot_be_met_is_named(activations: str) -> None:
    with pytest.raises(GraphPruneError, match="activations cannot be brought to"):
        graphprune.plan(net(), X, budget=Budget(**{activations: 0.01}))


def test_a_model_may_register_its_budget_for_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net_with_budget.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ["prune", "own_net_with_budget:make", "--input-shape", "5,3", "-o", str(tmp_path / "p"), "--json"]
    try:
        result = CliRunner().invoke(app, [*wanted, "--budget", "activations_of_own=0.5"])
        assert result.exit_code == 0, result.output
        kept = {g["name"]: g["kept"] for g in json.loads(result.stdout)["groups"]}
        assert sum(kept.values()) + 2 <= 0.5 * 66
    finally:
        if "activations_of_own" in BUDGETS:
            BUDGETS.remove("activations_of_own")
    gone = CliRunner().invoke(app, [*wanted, "--budget", "activation=0.5"])
    assert gone.exit_code == 2 and "unknown budget" in gone.output


@pytest.mark.parametrize("name", ["mac", "Macs", "flops", "self", "paramz", "latency_s"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(GraphPruneError, match=f"unknown budget '{name}'.*Known: macs, params, memory, latency"):
        Budget(**{name: 0.5})


def test_the_nearest_name_is_proposed() -> None:
    with pytest.raises(GraphPruneError, match="did you mean 'params'"):
        Budget(param=0.5, macs=0.5)
    with pytest.raises(GraphPruneError, match="unknown budget 'flops'"):
        Budget(macs=0.5, flops=None)


def test_a_number_without_a_name_is_refused() -> None:
    with pytest.raises(GraphPruneError, match=r"say what 0.5 limits, as in Budget\(macs=0.5\)"):
        Budget(0.5)


def test_budgets_are_values() -> None:
    budget = Budget(params=0.5, macs=1000, memory=None)
    assert budget == Budget(macs=1000, params=0.5) != Budget(macs=1000)
    assert hash(budget) == hash(Budget(macs=1000, params=0.5))
    assert repr(budget) == "Budget(macs=1000, params=0.5)" and budget.limits() == {"macs": 1000, "params": 0.5}
    assert pickle.loads(pickle.dumps(budget)) == copy.deepcopy(budget) == budget
    with pytest.raises(AttributeError):
        budget._limits = ()  # type: ignore[misc]


def test_a_name_that_is_taken_or_no_name_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="budget 'macs' is already registered"):

        @budget_kind("macs")
        def own(graph: DependencyGraph, model: nn.Module, folds: Sequence[Any]) -> ProductCosts:
            return ProductCosts(graph)

    for name in ("", "two words", None):
        with pytest.raises(GraphPruneError, match="expected a name"):
            budget_kind(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda graph, model, folds: 3.0, "'own' returned float: expected a cost model"),
        (lambda graph, model, folds: 1 / 0, "'own' failed: ZeroDivisionError"),
        (lambda graph, model, folds: ProductCosts(graph), "own of this model are 0"),
    ],
)
def test_functions_that_give_no_cost_are_named(function: Any, message: str) -> None:
    budget_kind("own")(function)
    try:
        with pytest.raises(GraphPruneError, match=message):
            graphprune.plan(net(), X, budget=Budget(own=0.5))
    finally:
        BUDGETS.remove("own")
    with pytest.raises(GraphPruneError, match="unknown budget 'own'"):
        Budget(own=0.5)


def test_a_budget_of_what_a_model_has_none_of_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="macs of this model are 0"):
        graphprune.plan(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), X, budget=Budget(macs=0.5))
