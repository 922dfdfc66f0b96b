"""A loop is recorded turn by turn: right for as many turns as were recorded, refused for any other number."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests import oracles
from tests.plans.rewriting.literal_nets import Images


def _over_the_batch(m: nn.Module, y: Tensor) -> Tensor:
    y = torch.stack([y[i] * (i + 1) for i in range(y.shape[0])])
    return y[:, :8] - y[:, 8:]


def _over_an_attribute(m: nn.Module, y: Tensor) -> Tensor:
    for i in range(m.turns):
        y = torch.cat([y[:, 8:] * (i + 1), y[:, :8]], 1)
    return y[:, :8] - y[:, 8:]


def _over_the_channels(m: nn.Module, y: Tensor) -> Tensor:
    y = torch.cat([y[:, i : i + 4] * (i + 1) for i in range(0, y.shape[1], 4)], 1)
    return y[:, :8] - y[:, 8:]


@pytest.mark.parametrize("output", ["hybrid", "graph"])
def test_turns_that_depend_on_the_input(output: str) -> None:
    torch.manual_seed(0)
    model, example = Images(_over_the_batch, 8).double(), torch.randn(2, 3, 8, 8).double()
    plan = graphprune.plan(model, example, 0.5, output=output)
    small = plan.apply(model)
    assert len(plan.rewrites) == 1
    other = torch.randn(2, 3, 12, 10).double()
    want = oracles.zero_reference(model, plan.removed)
    assert oracles.relative_error(small(other), want(other)) < 1e-9
    for batch in (1, 3):
        with pytest.raises(graphprune.GraphPruneError, match=r"x\.shape\[0\] == 2 \(test_loops.*was True.* is False"):
            small(torch.randn(batch, 3, 8, 8).double())


@pytest.mark.parametrize("output", ["hybrid", "graph"])
@pytest.mark.parametrize("middle", [_over_an_attribute, _over_the_channels])
def test_turns_that_do_not(middle: object, output: str) -> None:
    torch.manual_seed(0)
    model, example = Images(middle, 8).double(), torch.randn(2, 3, 8, 8).double()  # type: ignore[arg-type]
    model.turns = 3
    plan = graphprune.plan(model, example, 0.5, output=output)
    small = plan.apply(model)
    assert plan.removed
    other = torch.randn(5, 3, 12, 10).double()
    assert oracles.relative_error(small(other), oracles.zero_reference(model, plan.removed)(other)) < 1e-9


_seen: list[bool] = []  # what a closure of the model collected would be put back


def test_range_is_itself_while_recording_and_afterwards() -> None:
    def middle(m: nn.Module, y: Tensor) -> Tensor:
        turns = range(y.shape[2])
        _seen.append(isinstance(turns, range) and list(turns)[:2] == [0, 1])
        return y[:, :8] - y[:, 8:]

    before = builtins.range
    graphprune.plan(Images(middle, 8), torch.randn(2, 3, 8, 8), 0.5, output="hybrid")
    assert _seen
    assert all(_seen)
    assert builtins.range is before
