"""The options of a request: one list, checked before any work; granularities by name; the one place that rounds."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune
from graphprune import Budget, GraphPruneError, GroupKind
from graphprune.planning.allocation import Kinds
from graphprune.planning.allocation.rounding import Rounding, lost
from graphprune.planning.by_width import Widths, widths
from graphprune.planning.request import GRANULARITIES, Decision, Granularity, Request, strategy_of
from graphprune.plans.plan import Plan, structure_of
from graphprune.sparsity import Channels
from tests.moe_networks import Transformer

X = torch.randn(2, 3)


class Untouched(nn.Module):
    """Of which nothing may be run or read."""

    def forward(self, x: Any) -> Any:
        raise AssertionError("work began")


def options_of(function: Any) -> dict[str, tuple[Any, str]]:
    """Defaults and annotations."""
    return {n: (p.default, str(p.annotation)) for n, p in inspect.signature(function).parameters.items()}


FIELDS = {field.name: (field.default, str(field.type)) for field in dataclasses.fields(Request)}


def test_plan_and_prune_take_the_options_of_a_request() -> None:
    planned, pruned = options_of(graphprune.plan), options_of(graphprune.prune)
    assert {n: o for n, o in planned.items() if n not in ("model", "example_input", "progress")} == FIELDS
    assert {n: o for n, o in pruned.items() if n not in ("verify", "recover")} == planned


@pytest.mark.parametrize("function", [graphprune.prune_gradually, Channels])
def test_functions_that_hand_options_on_show_them(function: Any) -> None:
    shown = options_of(function)
    assert {"ignore", "criterion", "granularity", "target", "strict"} <= set(shown) and "options" not in shown
    own = {"ratio"} if function is graphprune.prune_gradually else set()  # takes no dict
    assert all(shown[n] == FIELDS[n] for n in shown.keys() & FIELDS.keys() - own)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 1.5}, r"ratio: expected a number in \[0, 1\)"),
    ({"ratio": {"a": 2}}, r"ratio\['a'\]: expected a number"),
    ({"ratio": {}}, "ratio: the dict is empty"),
    ({"ratio": {3: 0.5}}, "ratio: a dict maps names"),
    ({"ratio": 0.5, "budget": Budget(macs=0.5)}, "ratio and budget exclude each other"),
    ({"budget": 0.5}, r"budget: expected a graphprune\.Budget, got float"),
    ({"ignore": 3}, "ignore: expected modules, parameters, names or patterns, got int"),
    ({"ignore": [b"x"]}, "ignore: expected modules, parameters, names or patterns, got bytes"),
    ({"scope": "globally"}, "scope: expected one of"),
    ({"round_to": 0}, "round_to: expected"),
    ({"round_to": torch.tensor(3)}, "round_to: expected"),
    ({"min_channels": 0}, "min_channels: expected"),
    ({"max_ratio": 0}, "max_ratio: expected"),
    ({"output": "both"}, "output: expected one of"),
    ({"seed": -1}, "seed: expected a non-negative integer, got -1"),
    ({"seed": "1"}, "seed: expected a non-negative integer"),
    ({"fold_bn": "no"}, "fold_bn: expected True or False, got 'no'"),
    ({"strict": None}, "strict: expected True or False"),
    ({"target": "cuda"}, r"target: expected a graphprune\.Target"),
    ({"loss_fn": "mse"}, "loss_fn: expected a function"),
    ({"criterion": "l3"}, "unknown criterion 'l3'"),
    ({"criterion": "wanda"}, "needs data"),
    ({"layer_criterion": "output"}, "elsewhere use criterion"),
    ({"granularity": "layrs"}, "unknown granularity 'layrs'; did you mean 'layer'"),
    ({"granularity": []}, "granularity: expected a name or a list of names"),
    ({"granularity": {"heads"}}, "granularity: expected a name or a list of names"),
    ({"granularity": ["heads", "auto"]}, "'auto' does not go with 'heads'"),
    ({"granularity": "layer", "criterion": "l2"}, "criterion: expected one of 'block_influence'"),
    ({"granularity": "layer", "criterion": "loss"}, "needs data= with pairs"),
    ({"granularity": "layer", "ratio": {"a": 0.5}}, "layers take one number"),
    ({"granularity": "layer", "budget": Budget(memory=0.5)}, "memory is not known for layers alone"),
    ({"granularity": "layer", "target": graphprune.Target()}, "target: it chooses widths"),
    ({"granularity": "experts", "budget": Budget(macs=0.5)}, "experts take one number"),
    ({"granularity": "experts", "criterion": "l2"}, "experts are ranked by 'routing'"),
    ({"granularity": ["layer", "mlp"]}, "'layer' and widths at once need a budget"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_are_checked_before_any_work(options: dict[str, Any], message: str) -> None:
    for function in (graphprune.plan, graphprune.prune):
        with pytest.raises(GraphPruneError, match=message):
            function(Untouched(), X, **options)
    if not {"max_ratio", "output"} & options.keys():
        with pytest.raises(GraphPruneError, match=message):
            graphprune.prune_gradually(Untouched(), X, **options)
    if not {"ratio", "budget", "max_ratio", "output", "layer_criterion", "fold_bn"} & options.keys():
        with pytest.raises(GraphPruneError, match=message):
            Channels(X, **options)
        if "needs data" not in message:  # to those the pipeline gives its batches
            with pytest.raises(GraphPruneError, match=message):
                graphprune.pipeline(Untouched(), X, [], options=options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graphprune.prune_gradually(Untouched(), X, rond_to=3), "option 'rond_to'; did you mean 'round_to'"),
        (lambda: graphprune.prune_gradually(Untouched(), X, step=3), "prune_gradually: .*did you mean 'steps'"),
        (lambda: graphprune.prune_gradually(Untouched(), X, output="graph"), "output: modules that were replaced"),
        (lambda: graphprune.prune_gradually(Untouched(), X, ratio={"a": 0.5}), "ratio: expected one number"),
        (
            lambda: graphprune.prune_gradually(Untouched(), X, granularity="experts", recover="moments"),
            "repairs layers that lost inputs",
        ),
        (lambda: Channels(X, budget=Budget(macs=0.5)), "Channels: budget: .*prune_gradually approaches a budget"),
        (lambda: Channels(X, granularity="branch"), "granularity='branch' goes as a whole"),
        (lambda: Channels(X, critrion="l1"), "Channels: unknown option 'critrion'; did you mean 'criterion'"),
        (lambda: graphprune.pipeline(Untouched(), X, [], options={"fold_bn": True}), "options: fold_bn: batch norms"),
        (
            lambda: graphprune.pipeline(Untouched(), X, [], method="layers", options={"granularity": "mlp"}),
            "leaves things out as a whole, and granularity='mlp' does not",
        ),
        (
            lambda: graphprune.pipeline(Untouched(), X, [], method="gradient", options={"reducton": "sum"}),
            "options: unknown option 'reducton'; did you mean 'reduction'",
        ),
        (lambda: graphprune.sensitivity(Untouched(), X, granularity="layer"), "curves are of widths"),
    ],
)
def test_what_does_not_belong_is_said_before_any_work(call: Any, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        call()


# -- granularities


@pytest.fixture
def names() -> Iterator[None]:
    """Names that a test registers go again."""
    before = set(GRANULARITIES)
    yield
    for name in set(GRANULARITIES) - before:
        GRANULARITIES.remove(name)


@pytest.mark.usefixtures("names")
def test_a_name_of_widths_is_a_line() -> None:
    GRANULARITIES.add("inner", widths("mlp channel"))
    GRANULARITIES.add("inner", widths("mlp channel"))  # the same again
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval(), torch.randn(2, 5, 16)
    for name in ("inner", ["inner", "heads"]):
        builtin = "mlp" if name == "inner" else ["mlp", "heads"]
        assert graphprune.plan(net, x, granularity=name) == graphprune.plan(net, x, granularity=builtin)
    with pytest.raises(GraphPruneError, match="'mlp' is already registered"):
        GRANULARITIES.add("mlp", widths("head"))
    with pytest.raises(GraphPruneError, match=r"kind of groups: .* got 'mlp chanel'; did you mean 'mlp channel'"):
        widths("mlp chanel")


@pytest.mark.usefixtures("names")
def test_a_strategy_of_ones_own() -> None:
    class Nothing(Granularity):
        units = "nothings"

        def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
            return Decision(Plan(removed={}, structure=structure_of(model)), request)

    GRANULARITIES.add("nothing", Nothing())
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(1, 3)
    with pytest.warns(graphprune.GraphPruneWarning, match="the ratio of the nothings that can go round to none"):
        assert graphprune.plan(net, x, granularity="nothing").empty
    with pytest.raises(GraphPruneError, match="takes its ratio at once: use prune"):
        graphprune.prune_gradually(net, x, granularity="nothing")
    with pytest.raises(GraphPruneError, match="'mlp' does not go with 'nothing'"):
        graphprune.plan(net, x, granularity=["nothing", "mlp"])


def test_names_together_are_the_groups_of_each() -> None:
    both = strategy_of(["head", "mlp", "neuron"])
    assert isinstance(both, Widths)
    assert both.kinds == Kinds(frozenset(("head", "mlp channel")), frozenset(((2, 2),)))
    assert strategy_of("qk_features").kinds == strategy_of("qk features").kinds
    assert strategy_of(["mlp", "mlp"]).kinds == strategy_of("mlp").kinds


# -- as a whole, step by step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def seven() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *(Block() for _ in range(7)), nn.Linear(8, 2)).eval(), torch.randn(4, 3)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("granularity", ["layer", "branch"])
def test_layers_go_step_by_step_to_the_share_of_the_first_number(granularity: str, steps: int, ratio: float) -> None:
    net, x = seven()
    dense, each = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net[1].parameters())
    seen: list[int] = []

    def train(model: nn.Module, step: int) -> None:
        seen.append(sum(p.numel() for p in model.parameters()))

    small = graphprune.prune_gradually(net, x, ratio, steps=steps, granularity=granularity, train=train)
    gone = [math.floor(Fraction(ratio) * step / steps * 7 + Fraction(1, 2)) for step in range(1, steps + 1)]
    assert seen == [dense - each * n for n in gone]
    once = graphprune.prune(net, x, ratio, granularity=granularity)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in once.parameters())
    if steps == 1:
        assert torch.equal(small(x), once(x))


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_go_step_by_step(stacked: bool) -> None:
    torch.manual_seed(0)
    net, x = Transformer(stacked, experts=6, top_k=1).eval(), torch.randn(2, 4, 5)
    numbers: list[list[int]] = []

    def train(model: Any, step: int) -> None:
        numbers.append([len(layer.up if stacked else layer.experts) for layer in model.layers])

    small = graphprune.prune_gradually(net, x, 0.5, steps=5, granularity="experts", train=train)
    left = [6 - math.floor(0.5 * step / 5 * 6 + 0.5) for step in range(1, 6)]
    assert numbers == [[n, n] for n in left] and left[-1] == 3
    assert small(x).isfinite().all()


def test_gradual_layers_say_where_none_went() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(1, 3)
    with pytest.warns(graphprune.GraphPruneWarning, match="no layer can be left out") as caught:
        graphprune.prune_gradually(net, x, 0.5, steps=3, granularity="layer")
    assert len(caught) == 1


def test_layers_by_a_budget_step_by_step() -> None:
    net, x = seven()
    small = graphprune.prune_gradually(net, x, budget=Budget(macs=0.5), steps=3, granularity="layer")
    once = graphprune.prune(net, x, budget=Budget(macs=0.5), granularity="layer")
    assert graphprune.count(small, x).macs == graphprune.count(once, x).macs <= 0.5 * graphprune.count(net, x).macs


def test_the_steps_of_a_target_hold_step_by_step() -> None:
    from ..runtimes.latency.law import table

    net, x = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(1, 3)
    target, seen = graphprune.Target(table=table(8)), []
    graphprune.prune_gradually(
        net, x, 0.5, steps=4, target=target, train=lambda model, step: seen.append(model[0].out_features)
    )
    assert len(seen) == 4 and all(n % 8 == 0 for n in seen) and seen[-1] == 16


# -- widths


@settings(max_examples=300)
@given(
    size=st.integers(1, 40), step=st.sampled_from([1, 2, 3, 8, "auto"]), least=st.integers(1, 12),
    percent=st.integers(1, 100), data=st.data(),
)  # fmt: skip
def test_one_group_against_trying_every_width(size: int, step: Any, least: int, percent: int, data: Any) -> None:
    rounding = Rounding(step, least, percent / 100)
    must = min(n for n in range(1, size + 1) if (size - n) * 100 <= percent * size or n == size)
    assert rounding.floor(size) == must and rounding.least(size) == max(must, min(least, size))
    assert rounding.most(size) == max(n for n in range(size + 1) if n * 100 <= percent * size)
    possible = rounding.allowed(size, GroupKind.CHANNEL).tolist()
    if step != "auto":
        assert possible == [n for n in range(1, size + 1) if n % step == 0 or n == size]
    narrowest = rounding.narrowest(size, rounding.allowed(size, GroupKind.CHANNEL))
    assert narrowest == min(n for n in possible if n >= rounding.least(size))
    wish = data.draw(st.integers(1, size))
    found = rounding.alone(wish, size)
    multiples = [n for n in range(1, size + 50) if step == "auto" or n % step == 0]
    near = wish if wish == size else min(size, min(multiples, key=lambda n: (abs(n - wish), -n)))
    assert found == max(near, rounding.least(size))
    held = rounding.holds(wish, size)
    if wish < size and held:
        assert found == size
    if wish == size:
        assert held == "ratio"


@given(ratio=st.fractions(0, 1), number=st.integers(0, 1000))
def test_halves_go(ratio: Fraction, number: int) -> None:
    exact = ratio * number
    if abs(exact - math.floor(exact) - Fraction(1, 2)) > Fraction(1, 10**9):  # else the float may lie on either side
        assert lost(float(ratio), number) == min(range(number + 1), key=lambda n: abs(n - exact))
    assert [lost(0.5, n) for n in (1, 2, 3, 5)] == [1, 1, 2, 3]
