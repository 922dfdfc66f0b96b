"""Calls are recorded alike, whether their arguments were named or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.tracing.trace import record_run
from tests.examination import Demands, examine


class Calls(nn.Module):
    """A linear layer, attention and a product of matrices, with every argument named or none."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.table = nn.Parameter(torch.randn(8, 10))
        self.head = nn.Linear(10, 3)

    def _linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        if self.named:
            return F.linear(bias=layer.bias, weight=layer.weight, input=x)
        return F.linear(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._linear(x, layer) for layer in (self.query, self.key, self.value))
        if self.named:
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, scale=0.3)
            y = torch.matmul(input=y, other=self.table)
        else:
            y = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.3)
            y = torch.matmul(y, self.table)
        return self._linear(y, self.head)


class RootMeanSquare(nn.Module):
    """A norm of the user's own over the last axes, whose code says how wide it is."""

    def __init__(self, width: int, literal: bool, scaled: bool = True) -> None:
        super().__init__()
        self.shape, self.literal = (width,), literal
        self.weight = nn.Parameter(torch.rand(width) + 0.5) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float() if self.weight is not None else None
        return F.rms_norm(x, (12,) if self.literal else self.shape, scale, eps=1e-6)


def example() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_named_tensors_are_at_their_positions() -> None:
    graphs = [record_run(Calls(named), example()).graph for named in (True, False)]
    found = [[n.all_input_nodes for n in graph.nodes if n.op == "call_function"] for graph in graphs]
    assert [[i.name for i in inputs] for inputs in found[0]] == [[i.name for i in inputs] for inputs in found[1]]
    for node in graphs[0].nodes:
        assert not any(isinstance(value, torch.fx.Node) for value in node.kwargs.values()), node.format_node()


def test_named_arguments_are_pruned_as_others_are() -> None:
    torch.manual_seed(0)
    outcomes = [examine(Calls(named).eval(), example(), Demands()) for named in (True, False)]
    assert not outcomes[0].failed, str(outcomes[0])
    assert outcomes[0].share == outcomes[1].share > 0.4


@pytest.mark.parametrize("scaled", [True, False])
def test_the_width_that_a_norm_reads_follows(scaled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), RootMeanSquare(12, False, scaled), nn.Linear(12, 4)).eval()
    outcome = examine(model, example(), Demands(statistics=True, prove=True))
    assert not outcome.failed, str(outcome)
    assert outcome.share > 0.4


def test_a_width_that_is_a_literal_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), RootMeanSquare(12, True), nn.Linear(12, 4)).eval()
    outcome = examine(model, example(), Demands(statistics=True, prove=True))
    assert not outcome.failed, str(outcome)
    assert outcome.share == 0
    rewritten = examine(model, example(), Demands(statistics=True, prove=True, output="hybrid"))
    assert not rewritten.failed, str(rewritten)
    assert rewritten.share > 0.4
