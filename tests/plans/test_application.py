"""A plan is carried out on a copy of the model that it was made for, and on no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.plans.history import history_of


class Heads(nn.Module):
    def __init__(self, width: int = 8, heads: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(y.shape[0], self.heads, -1).view(y.shape))  # type: ignore[no-any-return]


X = torch.randn(1, 3, 4, 4)


def planned() -> tuple[Heads, Plan]:
    torch.manual_seed(0)
    model = Heads().eval()
    plan = graphprune.plan(model, X, 0.5)
    assert plan.attributes
    return model, plan


def test_what_is_cut_is_what_the_plan_says() -> None:
    model, plan = planned()
    small = plan.apply(model)
    kept = [i for i in range(8) if i not in plan.removed["a.weight"][0]]
    assert torch.equal(small.a.weight, model.a.weight[kept]) and torch.equal(small.b.weight, model.b.weight[:, kept])
    assert small.heads == len(kept) and model.heads == 8
    found = history_of(small)
    assert found is not None and found.plans == (plan,) and history_of(model) is None
    assert torch.equal(plan.operated(model).a.weight, small.a.weight) and history_of(plan.operated(model)) is None


def other(change: Callable[[Heads], Any]) -> Heads:
    model = planned()[0]
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Heads(6, 6), r"a\.weight has shape \(6, 3, 1, 1\), the plan expects \(8, 3, 1, 1\)"),
        (other(lambda m: m.add_module("c", nn.Linear(1, 1))), r"it knows no c\.weight"),
        (other(lambda m: m.b.register_parameter("bias", None)), r"this one has no b\.bias"),
        (other(lambda m: setattr(m, "heads", 4)), "expected heads: 8 -> 4, found 4"),
        (other(lambda m: delattr(m, "heads")), "sets heads, which is no number in this model"),
    ],
)
def test_another_model(model: nn.Module, message: str) -> None:
    _, plan = planned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (plan.check, plan.apply):
        with pytest.raises(GraphPruneError, match=message):
            call(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removed": {"a.weight": {0: (100,)}}}, r"removes from a\.weight what it does not have"),
        ({"caches": (("nowhere", "cache"),)}, r"cannot be carried out \(AttributeError"),
    ],
)
def test_a_plan_that_breaks_breaks_in_a_copy(change: dict[str, Any], message: str) -> None:
    model, plan = planned()
    with pytest.raises(GraphPruneError, match=message):
        dataclasses.replace(plan, **change).apply(model)
    assert model.a.weight.shape == (8, 3, 1, 1) and model.heads == 8
