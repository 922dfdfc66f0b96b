"""Operators of the user's that multiply with weights: each network has a twin of torch's layers, nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import rules
from graphprune.dependency.axes import Axes
from graphprune.errors import GraphPruneError
from graphprune.runtimes.latency.units import units_of
from graphprune.tracing.operators import products_of


@torch.library.custom_op("graphprune_layers::rows", mutates_args=())
def rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("graphprune_layers::columns", mutates_args=())
def columns(weight: Tensor, shift: Tensor, x: Tensor) -> Tensor:  # weight (in, out), and all of it in another order
    return x @ weight + shift


@columns.register_fake
def _(weight: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@torch.library.custom_op("graphprune_layers::kernel", mutates_args=())
def kernel(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


@kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


@torch.library.custom_op("graphprune_layers::back", mutates_args=())
def back(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride)


@back.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, stride)


@torch.library.custom_op("graphprune_layers::bent", mutates_args=())
def bent(x: Tensor, weight: Tensor) -> Tensor:  # a layer and its activation in one: no sum over the weight
    return F.linear(x, weight).relu()


@bent.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _differentiable(operator: Any, same: Callable[..., Tensor], tensors: tuple[int, ...]) -> None:
    """Gradients as torch has them of `same`; `tensors`: the places of those that have one."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            given = list(ctx.inputs)
            for place in tensors:
                given[place] = None if given[place] is None else given[place].detach().requires_grad_()
            wanted = [t for t in given if isinstance(t, Tensor)]
            found = iter(torch.autograd.grad(same(*given), wanted, grad))
        return tuple(next(found) if isinstance(t, Tensor) else None for t in given)

    operator.register_autograd(backward, setup_context=setup)


_differentiable(rows, F.linear, (0, 1, 2))
_differentiable(columns, lambda weight, shift, x: x @ weight + shift, (0, 1, 2))
_differentiable(kernel, lambda x, w, b, s, p, g: F.conv2d(x, w, b, s, p, 1, g), (0, 1, 2))
_differentiable(back, F.conv_transpose2d, (0, 1, 2))


def _with_channels(call: rules.Call, x: rules.State, axis: int, made: Any) -> rules.State:
    axis %= len(x.shape)
    return rules.State(call.shape, {**{a: m for a, m in x.axes.items() if a != axis}, axis: made})


def rows_rule(call: rules.Call) -> rules.Result:
    x, weight = call.state(call.arg(0)), call.state(call.arg(1))
    call.tie(x.axis(-1), weight.axis(1), weight.shape[1])
    if call.arg(2) is not None:
        call.tie(weight.axis(0), call.state(call.arg(2)).axis(0), weight.shape[0])
    call.reads(weight.axis(1))
    call.produces(weight.axis(0))
    return _with_channels(call, x, -1, weight.axis(0))


def columns_rule(call: rules.Call) -> rules.Result:
    weight, shift, x = (call.state(call.arg(place)) for place in range(3))
    call.produces(weight.axis(1))
    call.reads(weight.axis(0))
    call.tie(weight.axis(0), x.axis(-1), weight.shape[0])
    call.tie(shift.axis(0), weight.axis(1), weight.shape[1])
    return _with_channels(call, x, -1, weight.axis(1))


def kernel_rule(call: rules.Call) -> rules.Result:
    x, weight, bias = (call.state(call.arg(place)) for place in range(3))
    groups = call.arg(5)
    for axis in (2, 3):
        call.freeze(x.axis(axis), "spatial", "a kernel slides along this axis")
        call.freeze(weight.axis(axis), "kernel", "kernel positions are no channels")
    if groups == 1:
        call.tie(x.axis(1), weight.axis(1), weight.shape[1])
    else:  # (groups, channels of a group): as many as before, each narrower
        read = call.reshape(rules.State((x.shape[1],), {0: x.axis(1)}), (groups, weight.shape[1]))
        made = call.reshape(
            rules.State((weight.shape[0],), {0: weight.axis(0)}), (groups, weight.shape[0] // groups)
        )
        call.tie(read.axis(0), made.axis(0), groups)
        call.tie(read.axis(1), weight.axis(1), weight.shape[1])
        call.freeze(made.axis(0), "groups", "the number of groups stands in the code")
    call.tie(weight.axis(0), bias.axis(0), weight.shape[0])
    call.reads(weight.axis(1))
    call.produces(weight.axis(0))
    return rules.State(call.shape, {0: x.axis(0), 1: weight.axis(0)})


def back_rule(call: rules.Call) -> rules.Result:
    x, weight, bias = (call.state(call.arg(place)) for place in range(3))
    for axis in (2, 3):
        call.freeze(x.axis(axis), "spatial", "a kernel slides along this axis")
        call.freeze(weight.axis(axis), "kernel", "kernel positions are no channels")
    call.tie(x.axis(1), weight.axis(0), weight.shape[0])
    call.tie(weight.axis(1), bias.axis(0), weight.shape[1])
    call.reads(weight.axis(0))
    call.produces(weight.axis(1))
    return rules.State(call.shape, {0: x.axis(0), 1: weight.axis(1)})


RULES: dict[str, Callable[[rules.Call], rules.Result]] = {
    "rows": rows_rule,
    "columns": columns_rule,
    "kernel": kernel_rule,
    "back": back_rule,
    "bent": rows_rule,
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for name, function in RULES.items():
        rules.rule(f"graphprune_layers::{name}")(function)
    yield
    for registered in rules.registered():
        rules.unregister(registered)


class Rows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rows(x, self.weight, self.bias)
        return out


class NamedRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.graphprune_layers.rows(x, weight=self.weight, bias=self.bias)
        return out


class TurnedRows(nn.Linear):
    """The weight comes through data movement."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = columns(self.weight.t(), self.bias, x)
        return out


class Columns(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        drawn = nn.Linear(inputs, outputs)
        self.weight, self.bias = nn.Parameter(drawn.weight.detach().t().contiguous()), nn.Parameter(drawn.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = columns(self.weight, self.bias, x)
        return out


class MatrixColumns(Columns):
    """The twin: torch's own product with the same weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Kernel(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = kernel(x, self.weight, self.bias, self.stride[0], self.padding[0], self.groups)
        return out


class Back(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = back(x, self.weight, self.bias, self.stride[0])
        return out


def flat(layer: Any, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        layer(6, 9, bias=bias), nn.ReLU(), layer(9, 8, bias=bias), nn.Tanh(), layer(8, 5, bias=bias)
    ).eval()


def pictures(layer: Any, groups: int = 1) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        layer(3, 8, 3, padding=1), nn.ReLU(),
        layer(8, 8, 3, padding=1, stride=2, groups=groups), nn.ReLU(),
        layer(8, 4, 1),
    ).eval()  # fmt: skip


def enlarged(layer: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), layer(6, 7, 3, stride=2), nn.ReLU(), layer(7, 4, 2)).eval()


def tokens() -> Tensor:
    return torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "rows": (lambda: flat(Rows), lambda: flat(nn.Linear), tokens),
    "rows, by name": (lambda: flat(NamedRows), lambda: flat(nn.Linear), tokens),
    "rows, no bias": (lambda: flat(Rows, False), lambda: flat(nn.Linear, False), tokens),
    "rows, turned": (lambda: flat(TurnedRows), lambda: flat(nn.Linear), tokens),
    "columns": (lambda: flat(Columns), lambda: flat(MatrixColumns), lambda: tokens()[:, 0]),
    "kernel": (lambda: pictures(Kernel), lambda: pictures(nn.Conv2d), image),
    "kernel, groups": (lambda: pictures(Kernel, 2), lambda: pictures(nn.Conv2d, 2), image),
    "back": (lambda: enlarged(Back), lambda: enlarged(nn.ConvTranspose2d), image),
}
# Their weights are computed before the call, or its groups are torch's alone to change.
NOT_REFITTED = ("rows, turned",)
OWN_GROUPS = ("kernel, groups",)


def _groups(graph: Any) -> list[Any]:
    return [
        (g.name, g.kind, g.size, sorted((m.parameter, m.axis, m.role, m.positions.tolist()) for m in g.members))
        for g in graph.groups
    ]


@pytest.mark.parametrize("name", CASES)
def test_groups_plans_and_budgets_are_those_of_the_twin(name: str) -> None:
    make, make_twin, make_example = CASES[name]
    own, twin, x = make(), make_twin(), make_example()
    torch.testing.assert_close(own(x), twin(x))
    if name not in OWN_GROUPS:
        assert _groups(graphprune.trace(own, x)) == _groups(graphprune.trace(twin, x)) != []
    counted, wanted = graphprune.count(own, x), graphprune.count(twin, x)
    assert counted.macs == wanted.macs > 0 and not counted.uncounted
    assert [layer.macs for layer in counted.per_layer.values()] == [layer.macs for layer in wanted.per_layer.values()]
    requests: list[dict[str, Any]] = [
        {"ratio": 0.5},
        {"budget": graphprune.Budget(macs=0.5)},
        {"budget": graphprune.Budget(params=0.6)},
        {"ratio": 0.4, "scope": "global"},
    ]
    for request in requests:
        if name in OWN_GROUPS and "scope" in request:
            continue  # of torch's whole groups may go, too
        plan, expected = graphprune.plan(own, x, **request), graphprune.plan(twin, x, **request)
        assert plan.removed == expected.removed and plan.removed
        small = plan.apply(own)
        assert graphprune.verify(own, small, plan, x).passed
        assert graphprune.count(small, x).macs == graphprune.count(expected.apply(twin), x).macs


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_REFITTED])
@pytest.mark.parametrize("method", ["least_squares", "mean"])
def test_recovered_weights_are_those_of_the_twin(name: str, method: str) -> None:
    make, make_twin, make_example = CASES[name]
    own, twin, x = make(), make_twin(), make_example()
    data = [torch.randn(40, *x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plan = graphprune.plan(twin, x, 0.5)
    # a layer of torch's own may be given a bias; a user's forward would not read it
    ours = graphprune.recover(own, plan, x, data, method, new_bias=False)
    theirs = graphprune.recover(twin, plan, x, data, method, new_bias=False)
    assert [(r.weight, r.method, r.changed) for r in ours.layers] == [
        (r.weight, r.method, r.changed) for r in theirs.layers
    ]
    assert ours.layers
    for key, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_REFITTED])
@pytest.mark.parametrize("criterion", ["reconstruction", "activation_mean", "activation_variance", "taylor_gate"])
def test_criteria_with_data_are_those_of_the_twin(name: str, criterion: str) -> None:
    make, make_twin, make_example = CASES[name]
    own, twin, x = make(), make_twin(), make_example()
    data = [(torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(s)), torch.zeros(1)) for s in (0, 1)]
    settings: dict[str, Any] = {"criterion": criterion, "data": data}
    if criterion == "taylor_gate":
        settings["loss_fn"] = lambda out, _: out.square().mean()
    assert graphprune.plan(own, x, 0.5, **settings).removed == graphprune.plan(twin, x, 0.5, **settings).removed


@pytest.mark.parametrize("name", ["rows", "rows, by name", "rows, turned", "columns"])
def test_a_product_with_a_matrix_has_the_latency_of_one(name: str) -> None:
    make, make_twin, make_example = CASES[name]
    found = []
    for model in (make(), make_twin()):
        graph = graphprune.trace(model, make_example())
        units, _ = units_of(graph.trace.graph.nodes, Axes(graph))
        found.append([(unit.kernel, unit.sample.lengths, unit.groups) for unit in units])
    assert found[0] == found[1] and len(found[0]) == 3


def test_what_a_call_multiplies() -> None:
    graph = graphprune.trace(pictures(Kernel, 8), image())
    products = [product for node in graph.trace.graph.nodes for product in products_of(node)]
    assert [(p.weight.target, p.bias.target, p.produces, p.reads, p.data_axis, p.result_axis) for p in products] == [
        (f"{i}.weight", f"{i}.bias", (0,), (1,), 1, 1) for i in (0, 2, 4)
    ]
    assert [(p.groups, p.slides, p.transposed) for p in products] == [
        (1, (2, 3), False), (8, (2, 3), False), (1, (2, 3), False)
    ]  # fmt: skip
    graph = graphprune.trace(enlarged(Back), image())
    assert [p.transposed for node in graph.trace.graph.nodes for p in products_of(node)] == [False, True, True]


@pytest.mark.parametrize("widths", [(1, 4), (4, 1), (1, 1)])
def test_axes_of_length_one(widths: tuple[int, int]) -> None:
    x = torch.randn(5, 3)
    first, second = widths
    for layer in (Rows, Columns):
        torch.manual_seed(0)
        model = nn.Sequential(layer(3, 6), layer(6, first), layer(first, second), layer(second, 2))
        twin = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, first), nn.Linear(first, second), nn.Linear(second, 2))
        assert graphprune.count(model, x).macs == graphprune.count(twin, x).macs
        products = [p for n in graphprune.trace(model, x).trace.graph.nodes for p in products_of(n)]
        assert [(p.data_axis, p.result_axis) for p in products] == [(1, 1)] * 4


def test_what_is_no_sum_over_the_weight_is_pruned_and_left_alone_by_recovery() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight, self.last = nn.Linear(6, 9), nn.Parameter(torch.randn(8, 9)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(bent(self.first(x), self.weight))
            return out

    torch.manual_seed(0)
    model, x = Bent().eval(), torch.randn(4, 6)
    plan = graphprune.plan(model, x, 0.5)
    assert [group.kept for group in plan.groups] == [4, 4] or [group.kept for group in plan.groups] == [5, 4]
    recovery = graphprune.recover(model, plan, x, [torch.randn(64, 6)], "least_squares")
    told = {layer.weight: layer for layer in recovery.layers}
    assert not told["weight"].changed and "graphprune_layers::bent does not make sums" in told["weight"].note
    assert told["last.weight"].changed
    assert torch.equal(recovery.model.weight, plan.apply(model).weight)  # type: ignore[arg-type]


def test_what_is_declared_must_be_an_axis() -> None:
    rules.unregister("graphprune_layers::rows")

    @rules.rule("graphprune_layers::rows")
    def wrong(call: rules.Call) -> rules.Result:
        call.reads(call.state(call.arg(1)))  # type: ignore[arg-type]
        return rules.nothing(call)

    with pytest.raises(GraphPruneError, match=r"call.reads: expected what lies along one axis .* got State"):
        graphprune.trace(flat(Rows), tokens())
    assert "graphprune_layers::rows" in graphprune.count(flat(Rows), tokens()).uncounted
