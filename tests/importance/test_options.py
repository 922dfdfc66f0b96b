"""Reductions over the members of a group, and normalisers across groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import graphprune
from graphprune import GraphPruneError
from graphprune.importance import ImportanceContext, resolve_criterion, with_options
from tests.importance.reference import every, group, randn

TENSORS = {"a": randn(4, 3, seed=1), "b": randn(4, 5, seed=2)}
GROUP = group([("a", 0, every(4), "out"), ("b", 0, every(4), "out")])
BY_HAND = {
    "mean": lambda a, b: (a + b) / 2,
    "sum": lambda a, b: a + b,
    "max": max,
    "min": min,
    "prod": lambda a, b: a * b,
    "first": lambda a, b: a,
}


@pytest.mark.parametrize("reduction", BY_HAND)
@pytest.mark.parametrize("name", ["l2", "fpgm"])
def test_reductions(name: str, reduction: Any) -> None:
    context = ImportanceContext(torch.nn.Identity(), TENSORS)
    alone = [resolve_criterion(name)(context, group([(n, 0, every(4), "out")])) for n in TENSORS]
    want = [BY_HAND[reduction](a, b) for a, b in zip(*alone, strict=True)]
    np.testing.assert_allclose(with_options(name, reduction=reduction)(context, GROUP), want, rtol=1e-6)
    # nothing is left behind
    np.testing.assert_allclose(resolve_criterion(name)(context, GROUP), np.mean(alone, axis=0), rtol=1e-6)


def test_normalisers_decide_between_groups() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8)[:, :3] + torch.arange(1, 9)[:, None])
        net[1].weight.copy_(100 * (torch.eye(8) + torch.arange(1, 9)[:, None]))
    x = torch.randn(1, 3)

    def kept(normaliser: Any) -> list[int]:
        criterion = with_options("l2", normaliser=normaliser)
        return [g.kept for g in graphprune.plan(net, x, 0.4, scope="global", criterion=criterion).groups]

    assert kept("none")[1] == 8  # raw scores: the layer with large weights loses nothing
    for normaliser in ("mean", "max", "sum"):
        assert all(k < 8 for k in kept(normaliser))


@pytest.mark.parametrize(
    ("options", "message"), [({"reduction": "median"}, "reduction"), ({"normaliser": "gaussian"}, "normaliser")]
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        with_options("l2", **options)
