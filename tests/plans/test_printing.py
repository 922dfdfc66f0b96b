"""Plans as text: what goes, what was rounded, and what cannot go."""

from __future__ import annotations

from graphprune import Attempt, Latency, Plan
from graphprune.dependency.whole.blocks import Block
from graphprune.dependency.whole.experts import Experts
from graphprune.plans.data import AttributeChange, GroupPlan
from graphprune.plans.rewriting import Rewrite
from graphprune.plans.surgery import Fold

ATTRIBUTE = AttributeChange("a", "n", (), 4, 2)
LAYERS = (Block("l.1", 0, 0, True), Block("", 0, 0, False, True, (Block("p", 0, 0, False, True),)))


def test_widths() -> None:
    plan = Plan(
        removed={"a.weight": {0: (1, 2)}},
        attributes=(ATTRIBUTE,),
        folds=(Fold("a", "b", 0),),
        groups=(
            GroupPlan("a.weight[0]", "channel", 4, 2, 2.0), GroupPlan("c.weight[0]", "head", 4, 4, 3.0),
            GroupPlan("d.weight[0]", "channel", 4, 4), GroupPlan("e.weight[0]", "channel", 4, 3, 3.4),
        ),
        rewrites=(Rewrite("", "home", ()), Rewrite("m", "home", ())),
        latency=Latency(2.0, 4.0, (Attempt(2.0, 1.9, None),), 0, {}),
        frozen=("f.weight: read by code",),
    )  # fmt: skip
    assert str(plan) == plan.summary() == (
        "2 of 4 groups pruned, 1 batch norms folded\n"
        "  asked to remove 30.0% of each on average, removed 25.0%\n"
        "  a.weight[0]: 2 of 4 channels kept\n"
        "  c.weight[0]: 4 of 4 heads kept, 3 asked for\n"
        "  e.weight[0]: 3 of 4 channels kept\n"
        "  a.n: 4 -> 2\n"
        "  the model becomes a graph of its recorded calls\n"
        "  m becomes a graph of its recorded calls\n"
        "  latency: 4 ms dense, 2 ms asked for, 1.9 ms predicted, not measured\n"
        "cannot be removed:\n"
        "  f.weight: read by code"
    )


def test_layers_alone_and_with_widths() -> None:
    plan = Plan(removed={}, layers=LAYERS, frozen=("l.2 stays",))
    modules = [", ".join(block.modules) for block in LAYERS]
    head = f"2 layers left out\n  {modules[0]}: left out\n  {modules[1]}: left out\n"
    assert str(plan) == head + "  l.2 stays"
    both = Plan(removed={"a.weight": {0: (1,)}}, layers=LAYERS, frozen=("l.2 stays",))
    assert str(both) == (
        head + "0 of 0 groups pruned, 0 batch norms folded\ncannot be removed:\n  l.2 stays"
    )


def test_experts() -> None:
    experts = (Experts("r.weight", "", (0, 2)), Experts("s.weight", "list", (1,)))
    plan = Plan(removed={"r.weight": {0: (0, 2)}}, experts=experts, attributes=(ATTRIBUTE,), frozen=("t stays",))
    assert str(plan) == (
        "3 experts left out\n  r.weight: 2 experts left out\n  s.weight: 1 experts left out\n  a.n: 4 -> 2\n  t stays"
    )
