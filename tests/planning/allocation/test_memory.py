"""Memory: against a run in which every tensor is watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import graphprune
from graphprune import Budget, GraphPruneError
from graphprune.planning.allocation.memory import MemoryCosts
from graphprune.plans.surgery import find_folds
from graphprune.plans.verification.rewrite import gone_components
from tests.planning.allocation.test_budget import Mixed, X


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 40), nn.Linear(40, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Long(nn.Module):
    """The first result is needed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = self.b(self.b(y).relu_().view(*y.shape)).relu()
        return self.c(torch.cat([y, z], 1))


def watched(model: nn.Module, example: Tensor) -> float:
    """The most bytes of distinct storages alive after a recorded call, inputs and parameters apart."""
    graph = graphprune.trace(model, example).trace.graph
    values: dict[fx.Node, Any] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for n in node.all_input_nodes:
            last[n] = node
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {t.untyped_storage().data_ptr() for t in (*named.values(), example)}
    most = 0
    constants = graphprune.trace(model, example).trace.constants
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = example
            elif node.op == "get_attr":
                values[node] = named.get(node.target, constants.get(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                storages = {}
                for v in values.values():
                    for t in v if isinstance(v, (tuple, list)) else [v]:
                        if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                most = max(most, sum(storages.values()))
            for n in node.all_input_nodes:
                if last[n] is node and n in values:
                    del values[n]
            if node not in last and node.op == "call_function":
                del values[node]  # nobody looks at it
    return float(most)


class Recurrent(nn.Module):
    """Wide states and results, which are alive together with what they are made from."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.i, self.o = nn.Linear(8, 32), nn.Linear(64, 5)
        self.r = nn.LSTM(32, 32, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        if not self.packed:
            return self.o(self.r(y)[0])
        y = nn.utils.rnn.pack_padded_sequence(y, torch.arange(48, 0, -1), batch_first=True)
        return self.o(nn.utils.rnn.pad_packed_sequence(self.r(y)[0], batch_first=True)[0])


NETS: dict[str, tuple[Any, Tensor]] = {
    "plain": (Plain, torch.randn(64, 8)),
    "long": (Long, torch.randn(2, 3, 16, 16)),
    "mixed": (Mixed, X),
    "recurrent": (lambda: Recurrent(False), torch.randn(48, 48, 8)),
    "packed": (lambda: Recurrent(True), torch.randn(48, 48, 8)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_bytes_are_those_of_a_watched_run(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = NETS[name][0]().eval(), NETS[name][1]
    plan = graphprune.plan(model, x, ratio, fold_bn=False)
    small = plan.apply(model)
    graph = graphprune.trace(model, x)
    cost = MemoryCosts(graph, model, ())
    weights = sum(p.numel() * p.element_size() for p in small.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    found = cost.exact(gone_components(graph, plan))
    assert found == pytest.approx(weights + buffers + watched(small, x), rel=0.02)


@pytest.mark.parametrize("name", NETS)
def test_slopes_and_curves_are_those_of_the_value(name: str) -> None:
    model, x = NETS[name][0]().eval(), NETS[name][1]
    graph = graphprune.trace(model, x)
    cost = MemoryCosts(graph, model, find_folds(model, graph.trace))
    kept = np.random.default_rng(0).uniform(0.4, 0.9, len(graph.groups))
    slopes = cost.slopes(kept)
    for g in range(len(graph.groups)):
        at = np.array([kept[g] - 1e-6, kept[g] + 1e-6])
        whole = []
        for value in at:
            other = kept.copy()
            other[g] = value
            whole.append(cost.value(other))
        assert slopes[g] == pytest.approx((whole[1] - whole[0]) / 2e-6, rel=1e-3, abs=1)
        curve = cost.curve(g, kept, at)
        assert curve[1] - curve[0] == pytest.approx(whole[1] - whole[0], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_a_memory_budget_is_kept(name: str, fraction: float) -> None:
    model, x = NETS[name][0]().eval(), NETS[name][1]
    graph = graphprune.trace(model, x)
    full = MemoryCosts(graph, model, ()).full
    plan = graphprune.plan(model, x, budget=Budget(memory=fraction))
    found = MemoryCosts(graph, model, plan.folds).exact(gone_components(graph, plan))
    assert 0.9 * fraction * full <= found <= fraction * full


def test_an_impossible_memory_budget_is_an_error() -> None:
    with pytest.raises(GraphPruneError, match="memory cannot be brought"):
        graphprune.plan(Plain(), torch.randn(64, 8), budget=Budget(memory=0.001))
