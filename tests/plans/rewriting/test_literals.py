"""Every kind of size written in code is rewritten, and the result is exact: against the zeroed network, against the
network without those channels, at other batch sizes and resolutions, through a plan as JSON."""

from __future__ import annotations

import pytest
import torch

import graphprune
from tests.examination import Demands, examine
from tests.networks.registry import settle
from tests.plans.rewriting.literal_nets import NETS


@pytest.mark.parametrize("output", ["hybrid", "graph"])
@pytest.mark.parametrize("name", NETS)
def test_exact(name: str, output: str) -> None:
    torch.manual_seed(0)
    model, example, larger = NETS[name]()
    settle(model)
    demands = Demands(
        output=output,
        larger=larger,
        prove=True,
        statistics=name in ("layer_norm", "expand"),  # norms and means over channels that go
        permuted_groups=2,
    )
    outcome = examine(model.eval(), example, demands)
    assert not outcome.failed, outcome
    assert outcome.share > 0.1, outcome


@pytest.mark.parametrize("name", NETS)
def test_the_literals_block_in_module_mode(name: str) -> None:
    """Else the cases would show nothing: without rewriting less can be removed, and the plan names a line."""
    model, example, _ = NETS[name]()
    kept = graphprune.plan(model, example, 0.5)
    freed = graphprune.plan(model, example, 0.5, output="hybrid")
    assert freed.rewrites
    assert not kept.rewrites
    assert any("literal" in line and "literal_nets.py" in line for line in kept.frozen)


def test_only_the_blocking_module_is_replaced() -> None:
    model, example, _ = NETS["nested_and_shared"]()
    plan = graphprune.plan(model, example, 0.5, output="hybrid")
    assert [r.module for r in plan.rewrites] == ["block", "other"]
    small = plan.apply(model)
    assert type(small) is type(model)
    assert small.block is small.again
    assert isinstance(small.block, torch.fx.GraphModule)
    assert type(small.block.a) is torch.nn.Linear


def test_nothing_is_replaced_where_nothing_is_won() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    plan = graphprune.plan(model, torch.randn(1, 3, 8, 8), 0.5, output="hybrid")
    assert plan.removed
    assert not plan.rewrites
    literal, example, _ = NETS["slices"]()
    assert not graphprune.plan(literal, example, 0.5, output="hybrid", ignore=["stem"]).rewrites
