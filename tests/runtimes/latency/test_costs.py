"""Predictions: exact against the pruned network's own trace, wherever the machine's law is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.dependency import trace
from graphprune.plans.verification.rewrite import gone_components
from graphprune.runtimes.latency.context import Context, make_context
from graphprune.runtimes.latency.costs import LatencyCosts
from graphprune.runtimes.latency.forecast import measured_context
from graphprune.runtimes.profiles import NodeTime, Profile

from .law import law, meter, net, run_of, samples_of, seconds_of, table


def costs(model: nn.Module, example: Any, step: int = 1, overhead: float = 1.0) -> LatencyCosts:
    graph, made = trace(model, example), table(step)
    return LatencyCosts(graph, made, measured_context(graph, made, run_of(model, example, step, overhead)))


def test_all_computations_are_seen() -> None:
    model, x = net()
    found = samples_of(model, x)
    assert sorted(s.kernel.op for s in found) == sorted(
        ["conv", "conv", "depthwise", "conv", "grouped", "conv", "linear", "matmul", "matmul", "linear", "linear"]
    )
    by_op = {s.kernel.op: s.lengths for s in found}
    assert by_op["depthwise"] == (64,) and by_op["grouped"] == (4, 8, 12)
    assert [s.lengths for s in found if s.kernel.op == "matmul"] == [(4, 64, 8, 64), (4, 64, 64, 8)]
    assert next(s for s in found if s.kernel.transposed).lengths == (48, 24)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("granularity", ["auto", "head features", "channels"])
def test_a_prediction_is_the_time_of_the_pruned_network(ratio: float, granularity: str) -> None:
    model, x = net()
    plan = graphprune.plan(model, x, ratio, granularity=granularity)
    cost = costs(model, x)
    predicted = cost.exact(gone_components(cost.axes.graph, plan))
    assert predicted == pytest.approx(seconds_of(plan.apply(model), x), rel=1e-6)


def test_estimates_curves_and_whole_values_agree() -> None:
    model, x = net()
    cost = costs(model, x, 4)
    rng = np.random.default_rng(0)
    groups = cost.axes.graph.groups
    for _ in range(5):
        kept = np.array([rng.integers(1, g.size + 1) / g.size for g in groups])
        for g in range(len(groups)):
            fractions = np.array([0.25, 0.5, 1.0])
            curve = cost.curve(g, kept, fractions)
            whole = []
            for f in fractions:
                other = kept.copy()
                other[g] = f
                whole.append(cost.value(other))
            assert curve - curve[0] == pytest.approx(np.array(whole) - whole[0], abs=1e-12)


def test_the_dense_network_takes_what_was_measured() -> None:
    model, x = net()
    cost = costs(model, x, 8, overhead=1.7)
    assert cost.full == pytest.approx(seconds_of(model, x, 8, 1.7))


def test_what_the_nodes_are_short_of_the_call_grows_with_them() -> None:
    """Threads that wait for each other, above what calling the nodes takes."""
    model, x = net()
    graph, made = trace(model, x), table()
    run = run_of(model, x)
    context = measured_context(graph, made, Profile(run.nodes, 2 * run.wall))
    cost = LatencyCosts(graph, made, context)
    plan = graphprune.plan(model, x, 0.5)
    fixed = 2e-6 * len(run.nodes)
    scale = (2 * run.wall - fixed) / run.wall
    assert cost.full == pytest.approx(2 * run.wall) and cost.constant == pytest.approx(fixed)
    predicted = cost.exact(gone_components(graph, plan))
    assert predicted == pytest.approx(fixed + scale * seconds_of(plan.apply(model), x), rel=1e-6)


def test_nodes_that_take_longer_than_the_call_are_scaled_down() -> None:
    model, x = net()
    graph, made = trace(model, x), table()
    run = run_of(model, x)
    light = NodeTime("s", "Sigmoid", (), (), 1e-4)
    context = measured_context(graph, made, Profile((*run.nodes, light), run.wall / 2))
    assert LatencyCosts(graph, made, context).full == pytest.approx(run.wall / 2)


def test_a_context_scales_what_it_recognises_and_spreads_the_rest() -> None:
    model, x = net()
    samples = samples_of(model, x)
    alone = {s: law(s) for s in samples}
    run = run_of(model, x)
    changed = [NodeTime("a", "Add", (), (), 5e-6), NodeTime("r", "Reshape", (), (), 7e-6)]
    unknown = NodeTime("f", "FusedMatMul", ((3,), (5,)), ((7,),), run.nodes[-1].seconds * 3)
    nodes = (*[NodeTime(n.name, n.operator, n.inputs, n.outputs, 2 * n.seconds) for n in run.nodes[:-1]], unknown)
    context = make_context(Profile((*nodes, *changed), 1.0), samples, meter(), alone)
    assert context.light == pytest.approx(5e-6) and context.wall == 1.0
    assert context.fixed == pytest.approx(7e-6 + 2e-6 * (len(nodes) + 2))
    assert dict(context.factors) == pytest.approx(dict.fromkeys(samples[:-1], 2.0))
    assert context.factor(samples[-1]) == pytest.approx(3.0)


def test_without_node_times_the_whole_call_is_shared_out() -> None:
    model, x = net()
    samples = samples_of(model, x)
    alone = {s: law(s) for s in samples}
    half = sum(alone.values()) / 2
    context = make_context(Profile((), half), samples, meter(), alone)
    fixed = 2e-6 * len(samples)
    assert context == Context(half, 0.0, fixed, {}, pytest.approx((half - fixed) / (2 * half)))
    cost = LatencyCosts(trace(model, x), table(), context)
    assert cost.full == pytest.approx(half)


def test_elements_cost_what_their_number_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(1, 3, 4, 4)
    graph, made = trace(model, x), table()
    run = run_of(model, x)
    light = NodeTime("s", "Sigmoid", (), (), 1e-3)
    context = measured_context(graph, made, Profile((*run.nodes, light), run.wall + 1e-3))
    cost = LatencyCosts(graph, made, context)
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    want = seconds_of(small, x) + 0.5e-3
    assert cost.exact(gone_components(graph, plan)) == pytest.approx(want, rel=1e-6)


def test_paths_of_training_alone_cost_nothing() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.a(x).relu()
            return (self.b(h), self.aux(h)) if self.training else self.b(h)

    assert [s.lengths for s in samples_of(Aux().eval(), torch.randn(2, 4))] == [(2, 4, 8), (2, 8, 2)]
