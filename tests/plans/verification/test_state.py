"""Nothing that a pruned network holds may differ from what its plan makes, and what only running changes may."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

import graphprune
from graphprune.plans.verification.state import checked_state
from graphprune.recovery.repair.checking import Check
from graphprune.tracing.example import ExampleInput
from tests.plans.verification.damages import DAMAGES, Image, made

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [(kind, name) for kind, damages in DAMAGES.items() for name in damages]


@functools.cache
def planned(kind: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, Tensor, graphprune.Plan, Any]:
    net, x = made(kind, dtype)
    plan = graphprune.plan(net, x, 0.5, fold_bn=False)
    assert plan.removed
    return net, x, plan, graphprune.trace(net, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_undamaged_networks_pass(kind: type[nn.Module], dtype: torch.dtype) -> None:
    net, x, plan, graph = planned(kind, dtype)
    small = plan.apply(net)
    for change in (lambda: None, lambda: small(x), small.train, lambda: small.requires_grad_(False)):
        change()
        report = graphprune.verify(net, small, plan, x, graph=graph)
        assert report.passed, str(report)
        small.eval()
    assert graphprune.verify(net, copy.deepcopy(small), plan, x, graph=graph).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_damage_is_caught(kind: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    net, x, plan, graph = planned(kind, dtype)
    small = plan.apply(net)
    DAMAGES[kind][name](small)
    if dtype is torch.float32:
        report = graphprune.verify(net, small, plan, x, graph=graph)
        state = next(check for check in report.checks if check.name == "state")
    else:  # the same check, without runs of the whole networks
        state, _ = checked_state(small, plan.apply(net), ExampleInput.of(x))
    assert not state.passed and state.detail


def test_a_damage_is_named() -> None:
    net, x, plan, graph = planned(Image, torch.float32)
    small = plan.apply(net)
    small.bn.eps, small.drop.p = 2e-5, 0.9
    said = str(graphprune.verify(net, small, plan, x, graph=graph))
    assert "bn.eps: 2e-05 instead of 1e-05; drop.p: 0.9 instead of 0.1" in said
    small = plan.apply(net)
    small.b.stride = (9, 9)
    small.head = nn.Linear(6, 4, bias=False)
    small.head.weight = nn.Parameter(torch.zeros(4, 5))  # it does not even run
    report = graphprune.verify(net, small, plan, x, graph=graph)
    assert [check.name for check in report.checks if not check.passed] == ["forward", "state"]
    assert "b.stride[0]: 9 instead of 1" in str(report)


# -- what running changes by itself


class Running(nn.Module):
    """Tables made at the first call, counters, and what the last call left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 16), nn.Linear(16, 4), nn.LayerNorm(16)
        self.table: Tensor | None = None
        self.kept: dict[Any, Tensor] = {}
        self.calls, self.trained, self.last, self.seen = 0, 0, (), collections.deque(maxlen=2)
        self.register_buffer("peak", torch.zeros(()))
        self.ready, self.eps = False, 1e-6

    @functools.cached_property
    def doubled(self) -> float:
        return 2 * self.eps

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.trained += self.training
        if self.table is None:
            self.table = torch.linspace(0.5, 1, x.shape[1], dtype=x.dtype)
        if x.shape not in self.kept:
            self.kept[x.shape] = x.new_ones(x.shape[1])
        h = self.norm(self.a(x * self.table * self.kept[x.shape]).relu())
        self.peak = torch.maximum(self.peak, h.detach().abs().max())
        self.last, self.ready = (h.detach().mean(),), True
        self.seen.append(self.calls)
        return self.b(h) + self.doubled


def running() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Running().eval(), torch.randn(3, 6)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (2, 3), (0, 0)])
def test_what_running_changes_is_no_damage(before: int, after: int) -> None:
    net, x = running()
    for _ in range(before):
        net(x)
    plan = graphprune.plan(net, x, 0.5)
    small: Any = plan.apply(net)
    for _ in range(after):
        small(2 * x)
    report = graphprune.verify(net, small, plan, x)
    assert report.passed and plan.removed, str(report)
    net(3 * x)
    small.train()
    small(x)
    assert graphprune.verify(net, small.eval(), plan, x).passed
    small.eps = 1e-5
    assert "eps: 1e-05 instead of 1e-06" in str(graphprune.verify(net, small, plan, x))


def test_hooks_and_gradients_are_no_damage() -> None:
    net, x = running()
    plan = graphprune.plan(net, x, 0.5)
    small: Any = plan.apply(net)
    small.a.register_forward_hook(lambda *_: None)
    small(x).sum().backward()
    assert small.a.weight.grad is not None and graphprune.verify(net, small, plan, x).passed


def test_one_frozen_layer_and_modes_of_single_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train()
    net[1].eval()
    net[0].requires_grad_(False)
    x = torch.randn(5, 4)
    plan = graphprune.plan(net, x, 0.5, fold_bn=False)
    small = plan.apply(net)
    assert graphprune.verify(net, small, plan, x).passed
    assert graphprune.verify(net, copy.deepcopy(small).eval().requires_grad_(False), plan, x).passed
    for damage in (lambda m: m[1].train(), lambda m: m[3].eval(), lambda m: m[0].requires_grad_(True)):
        wrong = plan.apply(net)
        damage(wrong)
        assert not graphprune.verify(net, wrong, plan, x).passed


def test_observers_of_quantisation_move_with_every_run() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    net, x = nn.Sequential(tq.QuantStub(), *layers, tq.DeQuantStub()).train(), torch.randn(4, 3, 12, 12)
    net.qconfig = tq.get_default_qat_qconfig("x86")
    tq.fuse_modules_qat(net, [["1", "2", "3"]], inplace=True)
    tq.prepare_qat(net, inplace=True)
    net(x)
    net.eval()
    plan = graphprune.plan(net, x, 0.5)
    small = plan.apply(net)
    assert plan.removed and graphprune.verify(net, small, plan, x).passed
    small(1.1 * x)
    net(0.9 * x)
    assert graphprune.verify(net, small, plan, x).passed
    with torch.no_grad():
        next(p for p in small.parameters() if p.dim() == 4)[0, 0, 0, 0] *= 1.01
    assert not graphprune.verify(net, small, plan, x).passed


# -- trained and repaired networks


def test_trained_networks_are_compared_in_structure() -> None:
    net, x, plan, graph = planned(Image, torch.float32)
    small = plan.apply(net).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        small(x).square().mean().backward()
        optimizer.step()
    small.head.requires_grad_(False)
    plain = graphprune.verify(net, small, plan, x, graph=graph)
    assert not plain.passed and "trained=True" in str(plain)
    report = graphprune.verify(net, small, plan, x, graph=graph, trained=True)
    assert report.passed and [c.name for c in report.checks][:2] == ["forward, trained", "trained"]
    small.bn.eps = 1e-3
    assert "bn.eps" in str(graphprune.verify(net, small, plan, x, graph=graph, trained=True).checks[1])
    small.bn.eps, small.head = 1e-5, nn.Linear(6, 5)
    assert not graphprune.verify(net, small, plan, x, graph=graph, trained=True).passed


def convolutions() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Flatten(2), nn.Linear(16, 6), nn.LayerNorm(6), nn.Linear(6, 3),
    )  # fmt: skip
    net.scales = [1.0, 2.0]  # type: ignore[assignment]
    net.train()
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        net(x)
    return net.eval(), x


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("method", ["mean", "moments", "batchnorm", "least_squares"])
def test_what_a_repair_may_change_and_what_not(method: str, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Check, "passes", lambda self, surely=False, at=None: True)  # whether it helps is not asked here
    net, x = convolutions()
    plan = graphprune.plan(net, x, 0.5, fold_bn=fold)
    data = None if method == "moments" else [x, x[:1]]  # the last batch is held
    small = graphprune.recover(net, plan, x, data, method).model
    cut = plan.apply(net)
    assert not all(map(torch.equal, small.state_dict().values(), cut.state_dict().values()))
    report = graphprune.verify(net, small, plan, x)
    assert report.passed and report.checks[1].name == "repaired", str(report)

    def layer_norm(m: Any) -> None:
        m[8].weight.data[1] *= 1.01

    damages: list[Callable[[Any], Any]] = [
        layer_norm, lambda m: setattr(m[8], "eps", 1e-4), lambda m: m.scales.reverse(),
        lambda m: setattr(m[3], "padding", (1, 1)), lambda m: m[8].train(), lambda m: m.pop(2),
    ]  # fmt: skip
    if method != "least_squares":
        damages.append(lambda m: m[9].weight.data[0].mul_(1.01))
    for number, damage in enumerate(damages):
        wrong = copy.deepcopy(small)
        damage(wrong)
        assert not graphprune.verify(net, wrong, plan, x).passed, number
