"""Errors of a network's outputs with part of a group gone, against networks changed by hand."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.importance import ImportanceContext
from graphprune.importance import reconstruction as module
from graphprune.importance.calibration import Calibration
from graphprune.importance.calibration.source import CalibrationSource
from graphprune.importance.elimination import Elimination
from graphprune.importance.in_context import SHARES, Change, Reading, Runs, measured_costs, scaled
from graphprune.importance.reconstruction import RIDGE, _problem, _reading, reconstruction
from graphprune.support.progress import reporting
from tests.importance.test_elimination import matrix_of


class Chain(nn.Module):
    """What is read is nonlinear, and a global average adds up the errors of all places."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1, bias=False)
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))


class Twice(nn.Module):
    """A group that two linear layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(h).sigmoid() * self.c(h)


def setting(net: nn.Module, x: Tensor) -> tuple[ImportanceContext, graphprune.DependencyGraph, Calibration]:
    source = CalibrationSource.of(net, x[:1], [x[:5], x[5:]], None)
    assert source is not None
    calibration = source.calibration(net, [])
    tensors = {n: t.detach() for n, t in net.named_parameters()}
    return ImportanceContext(net, tensors, calibration=calibration), graphprune.trace(net, x[:1]), calibration


def without(reading: Reading, units: list[int]) -> Change:
    """What a reader gains when these units go and the others take over, by one system of equations."""
    matrix, weights = matrix_of(reading.quadratic), reading.matrix.double()
    kept = torch.ones(matrix.shape[1], dtype=torch.bool)
    kept[reading.features[units].flatten()] = False
    change = -weights
    change[:, kept] += torch.linalg.solve(matrix[:, kept][:, :, kept], matrix[:, kept] @ weights)
    return Change(reading.reader, change, -(reading.mean[:, None] @ change)[:, 0])


def output_error(calibration: Calibration, readings: list[Reading], units: list[int]) -> float:
    return Runs(calibration).error([without(reading, units) for reading in readings])


def refitted(layer: nn.Module, inputs: Tensor, gone: list[int]) -> None:
    """Ridge regression, from scratch, of what the layer makes of `inputs` (rows, features) on those that stay."""
    weight = layer.weight.data.flatten(1).double()
    taps = weight.shape[1] // layer.weight.shape[1]
    lost = [u * taps + t for u in gone for t in range(taps)]
    kept = [i for i in range(weight.shape[1]) if i not in lost]
    centred = inputs.double() - inputs.double().mean(0)
    ridge = RIDGE * centred.square().mean() * len(inputs)
    z = torch.cat([centred[:, kept], ridge.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    # the ridge also holds what is not removed: its own part of the target
    target = torch.cat([centred @ weight.T, ridge.sqrt() * weight[:, kept].T])
    new = torch.zeros_like(weight)
    new[:, kept] = torch.linalg.lstsq(z, target).solution.T
    shift = (weight - new) @ inputs.double().mean(0)
    layer.weight.data = new.reshape(layer.weight.shape).float()
    old = torch.zeros(len(weight)) if layer.bias is None else layer.bias.data
    layer.bias = nn.Parameter(old + shift.float())


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x).double() - b(x).double()).square().sum() / len(x))


@pytest.mark.parametrize("gone", [[1], [0, 3, 4], [0, 1, 2, 4, 5]])
def test_convolutions_against_a_network_refitted_by_hand(gone: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Chain().eval(), torch.randn(12, 2, 4, 4)
    context, graph, calibration = setting(net, x)
    group = next(g for g in graph.groups if any(m.parameter == "b.weight" and m.role == "in" for m in g.members))
    reading = _reading(context, next(m for m in group.members if m.parameter == "b.weight"))
    assert reading is not None
    other = copy.deepcopy(net)
    rows = nn.functional.unfold(net.a(x).relu().detach(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    refitted(other.b, rows, gone)
    error = output_error(calibration, [reading], gone)
    assert error == pytest.approx(difference(net, other, x), rel=1e-3)


def test_all_readers_of_a_group_change_together() -> None:
    torch.manual_seed(1)
    net, x = Twice().eval(), torch.randn(40, 3)
    context, graph, calibration = setting(net, x)
    (group,) = (g for g in graph.groups if g.size == 8)
    readings = [r for m in group.members if m.role == "in" and (r := _reading(context, m)) is not None]
    assert len(readings) == 2
    other = copy.deepcopy(net)
    for layer in (other.b, other.c):
        refitted(layer, net.a(x).tanh().detach(), [2, 3, 7])
    error = output_error(calibration, readings, [2, 3, 7])
    assert error == pytest.approx(difference(net, other, x), rel=1e-3)


def test_grouped_convolutions_are_refitted_group_by_group() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(30, 2, 4, 4)
    context, graph, calibration = setting(net, x)
    group = next(g for g in graph.groups if any(m.parameter == "2.weight" and m.axis == 1 for m in g.members))
    reading = _reading(context, next(m for m in group.members if m.parameter == "2.weight" and m.axis == 1))
    assert reading is not None and group.size == 4
    other, halves = copy.deepcopy(net), []
    hidden = net[1](net[0](x)).detach()
    for part in range(2):
        half = nn.Conv2d(4, 3, 3)
        half.weight.data, half.bias.data = net[2].weight.data.chunk(2)[part], net[2].bias.data.chunk(2)[part]
        rows = nn.functional.unfold(hidden.chunk(2, 1)[part], 3).transpose(1, 2).flatten(0, 1)
        refitted(half, rows, [0, 3])
        halves.append(half)
    other[2].weight.data = torch.cat([h.weight.data for h in halves])
    other[2].bias.data = torch.cat([h.bias.data for h in halves])
    error = output_error(calibration, [reading], [0, 3])
    assert error == pytest.approx(difference(net, other, x), rel=1e-3)


@pytest.mark.parametrize("channels", [2, 3, 6, 11])
def test_costs_add_up_to_what_is_measured(channels: int) -> None:
    torch.manual_seed(channels)
    net, x = Chain(channels).eval(), torch.randn(12, 2, 4, 4)
    context, graph, calibration = setting(net, x)
    group = next(g for g in graph.groups if any(m.parameter == "b.weight" and m.role == "in" for m in g.members))
    readings = [r for m in group.members if m.role == "in" and (r := _reading(context, m)) is not None]
    elimination = Elimination([_problem(context, reading) for reading in readings], channels)
    order, costs = measured_costs(calibration, readings, elimination, channels)
    highest = 0.0
    for share in SHARES:
        end = max(1, min(channels - 1, round(share * channels)))
        highest = max(highest, output_error(calibration, readings, order[:end]))
        assert sum(costs[:end]) == pytest.approx(highest, rel=1e-6)


def test_weights_are_back_after_a_measurement_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Chain().eval(), torch.randn(12, 2, 4, 4)
    context, graph, calibration = setting(net, x)
    before = {n: t.detach().clone() for n, t in calibration.weights.items()}
    for group in graph.groups:
        reconstruction(context, group)
    member = next(m for g in graph.groups for m in g.members if m.parameter == "b.weight" and m.role == "in")
    reading = _reading(context, member)
    assert reading is not None

    def fails(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(Chain, "forward", fails)
    with pytest.raises(graphprune.GraphPruneError, match="stop"):
        output_error(calibration, [reading], [0])
    for name, value in before.items():
        assert torch.equal(calibration.weights[name], value)


def test_errors_that_add_up_before_a_global_average_count_in_full() -> None:
    """The input of every sample is the same at its 64 places, so errors are too: 64 times the effect that independent
    ones would have."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(64, 2, 1, 1).expand(-1, -1, 8, 8).contiguous()
    context, graph, calibration = setting(net, x)
    (group,) = (g for g in graph.groups if g.size == 8)
    alone = ImportanceContext(net, context.tensors, calibration=calibration, compared=False)
    apart, together = reconstruction(alone, group), reconstruction(context, group)
    assert np.array_equal(np.argsort(apart), np.argsort(together))
    # what is left after the least unit of all has gone too is the same constant network in both
    assert np.sort(together)[:-1].sum() == pytest.approx(64 * np.sort(apart)[:-1].sum(), rel=0.2)


class Detector(Twice):
    """How many results there are depends on what they are."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y[: 1 + round(float(y.square().sum() * 1e6)) % 7]


def test_outputs_that_change_their_shapes_leave_the_costs_as_they_are() -> None:
    torch.manual_seed(1)
    net, x = Detector().eval(), torch.randn(40, 3)
    context, graph, calibration = setting(net, x)
    (group,) = (g for g in graph.groups if g.size == 8)
    readings = [r for m in group.members if m.role == "in" and (r := _reading(context, m)) is not None]
    errors = [output_error(calibration, readings, [u]) for u in range(8)]
    assert any(math.isnan(e) for e in errors)
    assert scaled([2.0, 3.0], [1], [math.nan]) == [2.0, 3.0]
    assert scaled([2.0, 3.0, 1.0], [1, 2], [math.nan, 8.0]) == [2.0, 8.0, pytest.approx(8 / 3)]
    elimination = Elimination([_problem(context, reading) for reading in readings], 8)
    costs = measured_costs(calibration, readings, elimination, 8)[1]
    assert all(math.isfinite(c) and c >= 0 for c in costs)


def test_groups_that_are_not_compared_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seen(_c: object, _r: object, elimination: Elimination, units: int) -> tuple[list[int], list[float]]:
        asked.append(units)
        return elimination.finish()

    net, x = Chain().eval(), torch.randn(12, 2, 4, 4)
    monkeypatch.setattr(module, "measured_costs", seen)
    graphprune.plan(net, x[:1], 0.5, criterion="reconstruction", data=[x])
    assert not asked
    graphprune.plan(net, x[:1], budget=graphprune.Budget(macs=0.5), criterion="reconstruction", data=[x])
    assert sorted(asked) == [4, 6]


def test_measuring_and_eliminating_are_told_step_by_step() -> None:
    torch.manual_seed(4)
    net, x = Chain(48).eval(), torch.randn(12, 2, 4, 4)
    context, graph, _ = setting(net, x)
    group = next(g for g in graph.groups if any(m.parameter == "b.weight" and m.role == "in" for m in g.members))
    found: list[graphprune.Progress] = []
    with reporting(found.append, "a call"):
        reconstruction(context, group)
    shares = [p.done for p in found if p.stages == ("a call", "measuring")]
    assert shares == list(range(len(SHARES) + 1))
    gone, told = 0, [p for p in found if p.stage == "eliminating"]
    assert len(told) > 2 * len(SHARES)  # blocks of units, and not all units of a share at once
    for before, now in itertools.pairwise(told):
        if now.done:
            assert now.done > before.done and now.total == before.total
            gone += now.done - before.done
        else:
            assert before.done == before.total
    assert gone == 47 and told[-1].done == told[-1].total
