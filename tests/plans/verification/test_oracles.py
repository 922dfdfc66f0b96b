"""`verify` passes honest results in every precision, and catches every kind of dishonest one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.plans.verification.oracles import permuted, zeroed
from graphprune.plans.verification.results import relative_error
from tests import oracles
from tests.networks.registry import settle


class Norms(nn.Module):
    """A residual stream with layer norms: removing channels changes their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.up = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 20)
        self.down, self.norm2, self.head = nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.norm2(x))


class Attention(nn.Module):
    """Query-key features that go change the temperature 1 / sqrt(d)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.features = 2, 8
        self.qkv, self.out, self.head = nn.Linear(10, 48), nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.features).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.features**-0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.out(y))


def conv() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    return model, torch.randn(2, 3, 8, 8)


NETS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "conv": conv,
    "norms": lambda: (Norms(), torch.randn(4, 6)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 10)),
}
CASES = [("conv", True), ("conv", False), ("norms", False), ("attention", False)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def planned(name: str, fold: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, graphprune.Plan]:
    model, x = NETS[name]()
    settle(model)
    model, x = model.to(dtype).eval(), x.to(dtype)
    kinds = ["channels", "head features"] if name == "attention" else "auto"  # features change the temperature
    plan = graphprune.plan(model, x, 0.5, fold_bn=fold, granularity=kinds)
    assert plan.removed and bool(plan.folds) == fold and bool(plan.rescales) == (name == "attention")
    assert plan.statistics == (name == "norms")
    return model, x, plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "fold"), CASES)
def test_honest_results_pass(name: str, fold: bool, dtype: torch.dtype) -> None:
    model, x, plan = planned(name, fold, dtype)
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, x)
    assert report.passed, str(report)
    assert {p.dtype for p in small.parameters()} == {dtype}
    computed = ["rounding"] if (plan.folds or plan.rescales) and dtype in (torch.float16, torch.bfloat16) else []
    rewrite = "rewritten graph" if plan.statistics else "zero equivalence"
    assert [c.name for c in report.checks] == ["forward", *computed, "permutation", rewrite, "state"]


Tampering = Callable[[nn.Module], None]


def flip_one_sign(small: nn.Module) -> None:
    """The largest weight of the layer in the middle."""
    weight = [m.weight for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][1]
    flat = weight.data.view(-1)
    flat[flat.abs().argmax()] *= -1


def swap_two_outputs(small: nn.Module) -> None:
    """As if other indices had been kept of the first weight than of its consumers."""
    weight = next(m.weight for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    weight.data[[0, 1]] = weight.data[[1, 0]]


def swap_two_inputs(small: nn.Module) -> None:
    """A consumer that was forgotten: its inputs are other channels than the ones it gets."""
    weight = [m.weight for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    weight.data[:, [0, 1]] = weight.data[:, [1, 0]]


def scale_a_layer(small: nn.Module) -> None:
    """A factor of its own, as a wrong temperature or a batch norm folded with the wrong variance would be."""
    next(m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))).weight.data.mul_(1.25)


def shift_a_bias(small: nn.Module) -> None:
    bias = [p for n, p in small.named_parameters() if n.endswith("bias")][-1]
    bias.data[0] += 0.5


TAMPERING: list[Tampering] = [flip_one_sign, swap_two_outputs, swap_two_inputs, scale_a_layer, shift_a_bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tamper", TAMPERING)
@pytest.mark.parametrize(("name", "fold"), CASES)
def test_tampering_is_caught(name: str, fold: bool, tamper: Tampering, dtype: torch.dtype) -> None:
    model, x, plan = planned(name, fold, dtype)
    small = plan.apply(model)
    tamper(small)
    report = graphprune.verify(model, small, plan, x)
    assert not report.passed
    failed = {c.name: c.error for c in report.checks if not c.passed}
    assert "state" in failed and failed.keys() <= {"rounding", "zero equivalence", "rewritten graph", "state"}
    assert max(error for name, error in failed.items() if name != "state") > 1e-4
    with pytest.raises(GraphPruneError, match="verification failed"):
        report.raise_on_failure()


@pytest.mark.parametrize(("name", "fold"), CASES)
def test_another_index_kept_than_the_plan_says_is_caught(name: str, fold: bool) -> None:
    model, x, plan = planned(name, fold)
    tensor, axis = next((n, a) for n, axes in plan.removed.items() for a in axes if n.endswith("weight"))
    length = model.get_parameter(tensor).shape[axis]
    gone = list(plan.removed[tensor][axis])
    kept = next(i for i in range(length) if i not in gone)
    wrong = {**plan.removed, tensor: {**plan.removed[tensor], axis: tuple(sorted([*gone[1:], kept]))}}
    small = dataclasses.replace(plan, removed=wrong).apply(model)
    assert not graphprune.verify(model, small, plan, x).passed


def test_a_temperature_that_was_forgotten_is_caught() -> None:
    model, x, plan = planned("attention", False)
    small = dataclasses.replace(plan, rescales=()).apply(model)
    assert not graphprune.verify(model, small, plan, x).passed


def test_a_fold_that_was_forgotten_is_caught() -> None:
    model, x, plan = planned("conv", True)
    small = plan.apply(model)
    with torch.no_grad():
        kept = [i for i in range(8) if i not in plan.removed["0.weight"][0]]
        small[0].weight.copy_(model[0].weight[kept])
    assert not graphprune.verify(model, small, plan, x).passed


def test_wrong_shapes_and_numbers_that_are_none_are_caught() -> None:
    model, x, plan = planned("conv", False)
    small = plan.apply(model)
    small[5] = nn.Conv2d(small[5].in_channels, 3, 1)
    report = graphprune.verify(model, small, plan, x)
    assert not report.passed and "output shapes" in str(report)
    small = plan.apply(model)
    small[5].bias.data[0] = float("nan")
    assert not graphprune.verify(model, small, plan, x).passed


class Claims(nn.Module):
    """Its groups are right for the graph it was recorded as."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.honest = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if self.honest else y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype))


def test_groups_that_are_not_interchangeable_are_caught_and_named() -> None:
    model, x = Claims(), torch.randn(3, 4)
    graph = graphprune.trace(model, x)
    plan = graphprune.plan(model, x, 0.5)
    model.honest = False  # the graph no longer tells the truth about the model
    report = graphprune.verify(model, plan.apply(model), plan, x, graph=graph)
    failed = next(c for c in report.checks if c.name == "permutation")
    assert not failed.passed and "a.weight[0]" in failed.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_leaves_both_models_alone(dtype: torch.dtype) -> None:
    model, x, plan = planned("conv", True, dtype)
    small = plan.apply(model.train())
    before = oracles.snapshot(model), oracles.snapshot(small)
    graphprune.verify(model, small, plan, x)
    assert not oracles.differences(before[0], oracles.snapshot(model))
    assert not oracles.differences(before[1], oracles.snapshot(small))


@pytest.mark.parametrize(("name", "fold"), CASES)
def test_models_without_data_are_planned_applied_and_checked_by_shape(name: str, fold: bool) -> None:
    model, x = NETS[name]()
    model = model.eval()
    meta, y = model.to("meta"), x.to("meta")
    plan = graphprune.plan(meta, y, 0.5, fold_bn=fold)
    small = plan.apply(meta)
    assert all(p.is_meta for p in small.parameters())
    report = graphprune.verify(meta, small, plan, y)
    assert report.passed and [c.name for c in report.checks] == ["forward", "state"]
    # the same plan, made without weights, holds for a model that has some
    real, x = NETS[name]()
    settle(real)
    real.eval()
    assert graphprune.verify(real, plan.apply(real), plan, x).passed
    assert {n: p.shape for n, p in plan.apply(real).named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }


def test_relative_error_against_arithmetic_by_hand() -> None:
    nan, inf = float("nan"), float("inf")
    assert relative_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])]) == 0.5
    assert relative_error([torch.tensor([nan, inf, 1.0])], [torch.tensor([nan, inf, 1.0])]) == 0
    assert relative_error([torch.tensor([nan, 1.0])], [torch.tensor([1.0, 1.0])]) == inf
    assert relative_error([torch.tensor([1])], [torch.tensor([2])]) == inf
    assert relative_error([torch.zeros(2)], [torch.zeros(3)]) == inf
    assert relative_error([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]) == inf
    assert relative_error([torch.tensor([1j])], [torch.tensor([2j])]) == 0.5


def test_zeroed_and_permuted_copies_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)
    plan = graphprune.plan(model, x, 0.5)
    gone = list(plan.removed["0.weight"][0])
    zero = zeroed(model, plan)
    expected = model[0].weight.detach().clone()
    expected[gone] = 0
    assert torch.equal(zero[0].weight, expected) and (zero[0].bias[gone] == 0).all()
    graph = graphprune.trace(model, x)
    shuffled = permuted(model, graph, graph.groups, seed=3)
    order = [int((model[0].weight == row).all(1).nonzero()) for row in shuffled[0].weight]
    assert sorted(order) == [0, 1, 2, 3] and order != [0, 1, 2, 3]
    assert torch.equal(shuffled[0].bias, model[0].bias[order])
    assert torch.equal(shuffled[1].weight, model[1].weight[:, order])


class _TooMuch(torch.overrides.TorchFunctionMode):
    """From a given number of matrix products on, memory has run out."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("after", [0, 4, 8])
def test_running_out_of_memory_is_explained(after: int) -> None:
    model, x = Norms(), torch.randn(4, 6)
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    graph = graphprune.trace(model, x)
    with _TooMuch(after), pytest.raises(GraphPruneError, match="memory"):
        graphprune.verify(model, small, plan, x, graph=graph)
    graphprune.verify(model, small, plan, x).raise_on_failure()


def test_memory_that_runs_out_between_runs_of_the_model_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes")

    model, x = Norms(), torch.randn(4, 6)
    plan = graphprune.plan(model, x, 0.5)
    monkeypatch.setattr("graphprune.plans.verification.oracles.run_rewritten", full)
    with pytest.raises(GraphPruneError, match=r"not enough memory to compare.*verify=False"):
        graphprune.verify(model, plan.apply(model), plan, x)


def test_other_errors_are_not_called_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("something else")

    model, x = Norms(), torch.randn(4, 6)
    plan = graphprune.plan(model, x, 0.5)
    monkeypatch.setattr("graphprune.plans.verification.oracles.run_rewritten", broken)
    with pytest.raises(RuntimeError, match="something else"):
        graphprune.verify(model, plan.apply(model), plan, x)


def test_the_rewritten_run_keeps_only_what_is_still_read() -> None:
    from graphprune.plans.verification.rewrite import RewrittenRun, gone_components

    model, x = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(8, 8), nn.ReLU())]), torch.randn(2, 8)
    graph, plan = graphprune.trace(model, x), graphprune.plan(model, x, 0.5)
    tensors = {n: model.get_parameter(n).detach() for n in graph.trace.parameters}
    run = RewrittenRun(graph, gone_components(graph, graphprune.plan(model, x, ignore="*")), tensors)
    most, call = 0, run._call

    def counted(node: Any) -> Any:
        nonlocal most
        most = max(most, sum(n.op == "call_function" for n in run.env))
        return call(node)

    run._call = counted  # type: ignore[method-assign]
    (out,) = run.run([x])
    assert torch.equal(out, model(x)) and plan.groups
    assert most <= 3
