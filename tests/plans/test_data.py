"""What follows from the fields of a plan alone."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune import Plan
from graphprune.dependency.temperature import Rescale
from graphprune.dependency.whole.blocks import Block
from graphprune.dependency.whole.experts import Experts
from graphprune.plans.data import AttributeChange, GroupPlan
from graphprune.plans.rewriting import Rewrite
from graphprune.plans.surgery import Fold

GROUPS = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0, 1), st.none() | st.floats(0, 1), st.integers(1, 9)).map(
        lambda t: GroupPlan("a", "channel", t[0], round(t[1] * t[0]), t[2] and t[2] * t[0], float(t[3]))
    ),
    max_size=6,
)


@given(GROUPS)
def test_asked_and_gone_are_means_by_weight(groups: list[GroupPlan]) -> None:
    plan = Plan(removed={}, groups=tuple(groups))
    spoken = [g for g in groups if g.asked is not None]
    if not spoken:
        assert plan.asked is None and plan.gone is None
        return
    asked, gone, total = Fraction(0), Fraction(0), Fraction(0)
    for g in spoken:
        assert g.asked is not None
        asked += Fraction(g.weight) * (1 - Fraction(g.asked) / g.size)
        gone += Fraction(g.weight) * Fraction(g.size - g.kept, g.size)
        total += Fraction(g.weight)
    assert plan.asked == pytest.approx(float(asked / total)) and plan.gone == pytest.approx(float(gone / total))


CHANGES: dict[str, Any] = {
    "removed": {"a.weight": {0: (1,)}},
    "attributes": (AttributeChange("a", "n", (), 4, 2),),
    "folds": (Fold("a", "b", 0),),
    "rescales": (Rescale("a.weight", 0, (1,), 2.0),),
    "rewrites": (Rewrite("a", "home", ()),),
    "experts": (Experts("router.weight", "", (0,)),),
    "layers": (Block("a", 0, 0, True),),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_a_plan_changes(field: str) -> None:
    plan = dataclasses.replace(Plan(removed={}), **{field: CHANGES[field]})
    assert plan.changes_widths == (field != "layers")
    assert plan.empty == (field not in ("removed", "layers"))
    assert not Plan(removed={}).changes_widths and Plan(removed={}).empty


def test_a_plan_cannot_be_changed_and_is_compared_by_what_it_says() -> None:
    plan = Plan(removed={"a.weight": {0: (1,)}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.output = "graph"  # type: ignore[misc]
    assert plan == Plan(removed={"a.weight": {0: (1,)}}) != Plan(removed={"a.weight": {0: (2,)}})


@pytest.mark.parametrize(("asked", "rounded"), [(None, False), (4.5, False), (3.5, False), (4.6, True), (3.4, True)])
def test_rounded(asked: float | None, rounded: bool) -> None:
    assert GroupPlan("a", "channel", 8, 4, asked).rounded == rounded


def test_attribute_changes_as_text() -> None:
    assert str(AttributeChange("a.b", "sizes", (1, "x"), 4, 2)) == "a.b.sizes[1]['x']: 4 -> 2"
    assert str(AttributeChange("", "n", (), 4, 2)) == "n: 4 -> 2"
