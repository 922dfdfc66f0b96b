from __future__ import annotations

import pytest
import torch

import graphprune
from tests.layered_networks import networks


@pytest.mark.parametrize("name", ["stages", "decoder", "attributes"])
def test_layers_are_held_to_one_in_a_hundred_thousand(name: str) -> None:
    model, x, _ = networks()[name]
    plan = graphprune.plan(model, x, 0.5, granularity="layer")
    small = plan.apply(model)
    assert all(c.error < 1e-6 for c in graphprune.verify(model, small, plan, x).checks if c.name.startswith("bypass"))
    factor = 1 + 3e-5
    small.register_forward_hook(lambda module, args, out: out * factor)
    report = graphprune.verify(model, small, plan, x)
    assert not report.passed and all(1e-5 < c.error < 1e-4 for c in report.checks if not c.passed)
    assert graphprune.verify(model, small, plan, x, tolerance=1e-4).passed


def test_another_layer_left_out_is_noticed() -> None:
    model, x, _ = networks()["stages"]
    plan = graphprune.plan(model, x, 0.2, granularity="layer")
    (block,) = plan.layers
    other = next(b for b in graphprune.plan(model, x, 0.99, granularity="layer").layers if b != block)
    wrong = graphprune.plans.surgery.remove_layers(model, [other])
    report = graphprune.plans.verification.verify_layers(model, wrong, [block], x)
    assert {c.name for c in report.checks if not c.passed} == {"bypass", "bypass, noise", "weights"}
    assert torch.isfinite(wrong(x)).all()
