"""Names and shapes, and their hash."""

from __future__ import annotations

import torch
from torch import nn

import graphprune
from graphprune.plans.structure import structural_hash, structure_of


def test_a_model_and_its_plans_have_one_hash() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    slow = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    assert structure_of(model) == slow
    plan = graphprune.plan(model, torch.randn(1, 3, 4, 4), 0.5)
    assert plan.structural_hash == structural_hash(model)
    others = [
        plan.apply(model), nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), nn.Sequential(nn.Conv2d(8, 3, 1)),
    ]  # fmt: skip
    assert len({structural_hash(m) for m in (model, *others)}) == 4


def test_a_shared_module_counts_under_each_of_its_names() -> None:
    part = nn.Linear(2, 2, bias=False)
    assert list(structure_of(nn.ModuleDict({"a": part, "b": part}))) == ["a.weight", "b.weight"]


def test_the_order_of_registration_is_no_structure() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(3, 3)
    assert structural_hash(nn.ModuleDict({"a": a, "b": b})) == structural_hash(nn.ModuleDict({"b": b, "a": a}))
