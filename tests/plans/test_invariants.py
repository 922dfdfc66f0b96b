"""A plan that cannot be in itself is refused, and says which entry cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphprune import GraphPruneError, Plan
from graphprune.dependency.temperature import Rescale
from graphprune.dependency.whole.blocks import Block
from graphprune.dependency.whole.experts import Experts
from graphprune.plans.data import AttributeChange
from graphprune.plans.invariants import check_invariants
from graphprune.plans.rewriting import Rewrite
from graphprune.plans.surgery import Fold

STRUCTURE = {
    "a.weight": (8, 3), "n.running_mean": (8,), "m.running_mean": (8,), "b.weight": (4, 8), "l.0.w": (2,), "scalar": (),
}  # fmt: skip
GOOD = Plan(removed={"a.weight": {0: (1, 5)}, "b.weight": {1: (1, 5)}}, structure=STRUCTURE)
LAYER = (Block("l.0", 0, 0, True),)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"removed": {"a.weight": {0: tuple(range(7)), 1: ()}}},
        {"folds": (Fold("a", "n", 0), Fold("b", "m", 1))},
        {"rescales": (Rescale("a.weight", 1, (0, 2), 2.0),)},
        {"layers": LAYER, "attributes": (AttributeChange("l.01", "n", (), 2, 1),)},
        {"experts": (Experts("a.weight", "", (7,)),)},
        {"output": "graph"},
    ],
)
def test_good_plans(change: dict[str, Any]) -> None:
    check_invariants(dataclasses.replace(GOOD, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "else"}, "output: expected one of 'module', 'hybrid', 'graph', got 'else'"),
        ({"removed": {"c.weight": {0: (1,)}}}, "axis 0 of c.weight, which it does not describe"),
        ({"removed": {"a.weight": {2: (1,)}}}, "axis 2 of a.weight, which it does not describe"),
        ({"removed": {"a.weight": {-1: (1,)}}}, "axis -1 of a.weight, which it does not describe"),
        ({"removed": {"a.weight": {1: (0, 1, 2)}}}, "all of axis 1 of a.weight; at least one must stay"),
        ({"removed": {"a.weight": {0: (8,)}}}, r"must be increasing and lie in \[0, 8\)"),
        ({"removed": {"a.weight": {0: (-1,)}}}, "must be increasing"),
        ({"removed": {"a.weight": {0: (2, 1)}}}, "must be increasing"),
        ({"removed": {"a.weight": {0: (1, 1)}}}, "must be increasing"),
        ({"folds": (Fold("a", "x", 0),)}, "folds x into a, which it does not describe"),
        ({"folds": (Fold("x", "n", 0),)}, "folds n into x, which it does not describe"),
        ({"folds": (Fold("a", "n", 2),)}, "along axis 2; expected 0 or 1"),
        ({"folds": (Fold("a", "n", 0), Fold("a", "m", 0))}, "two batch norms into one layer"),
        ({"folds": (Fold("a", "n", 0), Fold("b", "n", 0))}, "or one into two"),
        ({"rescales": (Rescale("c.weight", 0, (1,), 2.0),)}, "rescales axis 0 of c.weight"),
        ({"rescales": (Rescale("a.weight", 1, (3,), 2.0),)}, "rescales axis 1 of a.weight"),
        ({"rescales": (Rescale("a.weight", 1, (-1,), 2.0),)}, "rescales axis 1 of a.weight"),
        ({"experts": (Experts("a.weight", "", (8,)),)}, "experts of 'a.weight' that it does not describe"),
        ({"experts": (Experts("c.weight", "", (0,)),)}, "experts of 'c.weight' that it does not describe"),
        ({"experts": (Experts("scalar", "", (0,)),)}, "experts of 'scalar' that it does not describe"),
        ({"experts": (Experts("a.weight", "", (0,)),), "layers": LAYER}, "leaves out no experts"),
        ({"layers": (Block("l.1", 0, 0, True),)}, "leaves out 'l.1', which it does not describe"),
        ({"layers": LAYER, "attributes": (AttributeChange("l.0", "n", (), 2, 1),)}, r"changes l\.0, which lies in"),
        ({"layers": LAYER, "caches": (("l.0.x", "n"),)}, r"changes l\.0\.x, which lies in"),
        ({"layers": LAYER, "rewrites": (Rewrite("l.0", "home", ()),)}, r"changes l\.0, which lies in"),
        ({"layers": LAYER, "removed": {"l.0.w": {0: (1,)}}}, r"changes l\.0\.w, which lies in"),
    ],
)
def test_impossible_plans(change: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        check_invariants(dataclasses.replace(GOOD, **change))


def test_a_router_without_axes_in_a_file() -> None:
    """Found by reading: a shape without numbers was looked into."""
    data = GOOD.to_dict()
    data["experts"] = [{"router": "scalar", "listed": "", "gone": [0]}]
    data["counts"]["experts"] = 1
    with pytest.raises(GraphPruneError, match="experts of 'scalar'"):
        Plan.from_dict(data)
