"""Rules that users register: before, after, wrong ones, and errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import rules
from graphprune.errors import GraphPruneError


@torch.library.custom_op("graphprune_tests::soften", mutates_args=())
def soften(x: Tensor, slope: Tensor) -> Tensor:
    return x * torch.sigmoid(slope * x)


@soften.register_fake
def _(x: Tensor, slope: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("graphprune_tests::neighbours", mutates_args=())
def neighbours(x: Tensor) -> Tensor:
    return x + 0.5 * x.roll(1, 1)


@torch.library.custom_op("graphprune_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.relu(), x.tanh()


@torch.library.custom_op("graphprune_tests::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:  # named like one of torch's, and not the same
    return x.flip(1) @ weight.t()


OPERATORS = {"soften": soften, "neighbours": neighbours, "halves": halves}


class Net(nn.Module):
    def __init__(self, operator: str, slope: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.operator = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), operator
        self.slope = nn.Parameter(torch.rand(8, 1, 1)) if slope else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = OPERATORS[self.operator](x) if self.slope is None else OPERATORS[self.operator](x, self.slope)
        return self.last(out if isinstance(out, Tensor) else out[0] + out[1])


EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for name in rules.registered():
        rules.unregister(name)


def soften_rule(call: rules.Call) -> rules.Result:
    x, slope = call.state(call.arg(0)), call.state(call.arg(1))
    call.tie(x.axis(1), slope.axis(0), x.shape[1])
    return x


def test_frozen_before_pruned_and_proven_after() -> None:
    model = Net("soften", slope=True).eval()
    before = graphprune.trace(model, EXAMPLE)
    assert before.groups == ()
    assert "no rule for the operator graphprune_tests::soften (test_rules.py:" in before.explain("first.weight")
    assert graphprune.prune(model, EXAMPLE, 0.5).first.out_channels == 8

    assert rules.rule("graphprune_tests::soften")(soften_rule) is soften_rule
    plan = graphprune.plan(model, EXAMPLE, 0.5)
    small = plan.apply(model)
    assert graphprune.verify(model, small, plan, EXAMPLE).passed
    assert {m.parameter for m in graphprune.trace(model, EXAMPLE).groups[0].members} == {
        "first.weight", "first.bias", "slope", "last.weight",
    }  # fmt: skip
    assert small.first.out_channels == 4 and small.slope is not None and small.slope.shape == (4, 1, 1)
    # by hand: the removed channels zeroed in the whole network
    zeroed = copy.deepcopy(model)
    gone = list(plan.removed["first.weight"][0])
    with torch.no_grad():
        zeroed.last.weight[:, gone] = 0
        torch.testing.assert_close(small(EXAMPLE), zeroed(EXAMPLE), rtol=1e-5, atol=1e-6)

    rules.unregister("graphprune_tests::soften")
    assert graphprune.trace(model, EXAMPLE).groups == ()


def test_a_wrong_rule_is_caught() -> None:
    model = Net("neighbours")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    rules.rule(neighbours)(rules.elementwise)
    with pytest.raises(GraphPruneError, match="verification failed, the pruned network is not returned"):
        graphprune.prune(model, EXAMPLE, 0.5)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_several_results() -> None:
    rules.rule(torch.ops.graphprune_tests.halves.default)(rules.elementwise)
    assert rules.registered() == ("graphprune_tests::halves",)
    assert graphprune.prune(Net("halves"), EXAMPLE, 0.5).first.out_channels == 4


def test_an_operator_that_is_called_like_one_of_torch_is_not_taken_for_it() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(3, 8), nn.Parameter(torch.randn(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.graphprune_tests.linear(self.first(x), self.weight)  # type: ignore[no-any-return]

    graph = graphprune.trace(Flipped(), torch.randn(4, 3))
    assert graph.groups == () and "graphprune_tests::linear" in graph.explain("weight")


def test_operators_named_in_every_way() -> None:
    forms = ("graphprune_tests::soften", soften, torch.ops.graphprune_tests.soften)
    for form in (*forms, torch.ops.graphprune_tests.soften.default):
        rules.rule(form)(soften_rule)
        assert rules.registered() == ("graphprune_tests::soften",)
        rules.unregister(form)
        assert rules.registered() == ()


def test_an_operator_of_torch_without_a_rule() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.special.entr(self.first(x).sigmoid()).renorm(2, 0, 1.0))

    example = torch.randn(4, 3)
    assert "no rule for the operator renorm" in graphprune.trace(Decayed(), example).explain("first.weight")

    @graphprune.rule("aten::renorm")
    def renorm(call: rules.Call) -> rules.Result:
        x = call.state(call.arg(0))
        call.statistics(x.axis(1))
        return x

    assert graphprune.prune(Decayed(), example, 0.5).first.out_features == 4


def test_duplicates_and_names() -> None:
    rules.rule("graphprune_tests::soften")(soften_rule)
    rules.rule("graphprune_tests::soften")(soften_rule)  # the same again, as in a notebook
    with pytest.raises(GraphPruneError, match=r"has a rule already, .*soften_rule; take it back with"):
        rules.rule("graphprune_tests::soften")(rules.nothing)
    with pytest.raises(GraphPruneError, match="aten::linear has a built-in rule"):
        rules.rule("aten::linear")(rules.nothing)
    with pytest.raises(GraphPruneError, match="no rule was registered for graphprune_tests::halves; registered: graph"):
        rules.unregister("graphprune_tests::halves")
    for name in ("soften", "graphprune_tests::", "a::b::c", "graphprune_tests::soften.default"):
        with pytest.raises(GraphPruneError, match="expected a name like"):
            rules.rule(name)
    with pytest.raises(GraphPruneError, match="expected an operator or its name"):
        rules.rule(3)
    with pytest.raises(GraphPruneError, match="at least one operator"):
        rules.rule()
    with pytest.raises(GraphPruneError, match="expected a function"):
        rules.rule("graphprune_tests::halves")("elementwise")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda call: call.state(call.arg(0)).nothing, "raised AttributeError"),
        (lambda call: [call.state(call.arg(0))], "must return one State, it returned list"),
        (lambda call: rules.State((2, 8)), r"a State of shape \(2, 8\) for a result of shape \(2, 8, 4, 4\)"),
        (lambda call: "x", "must return a State or None for each result, it returned str"),
        (lambda call: rules.State(call.shape, {0: call.state(call.arg(0)).axis(1)}), "coordinates on axis 0"),
    ],
)
def test_rules_that_fail_are_named(function: Any, message: str) -> None:
    rules.rule("graphprune_tests::neighbours")(function)
    with pytest.raises(GraphPruneError, match=f"the rule for graphprune_tests::neighbours .*{message}"):
        graphprune.trace(Net("neighbours"), EXAMPLE)
