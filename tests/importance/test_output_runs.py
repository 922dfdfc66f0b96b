"""Outputs of changed networks, begun at the layers that changed, against whole runs of networks changed by hand."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.importance import in_context
from graphprune.importance.calibration import Calibration, CalibrationData, reruns
from graphprune.importance.in_context import Change, Runs, _affordable
from graphprune.support.walking import named_tensors
from graphprune.tracing.example import ExampleInput, flatten_tensors
from graphprune.tracing.state import evaluating
from graphprune.tracing.trace import record_run
from tests.stream_networks import STEPS, STEPS_OF, WIDTH, Network, block


def calibrated(net: nn.Module, batches: list[Tensor]) -> Calibration:
    example = ExampleInput.of(batches[0])
    return Calibration(net, record_run(net, example), CalibrationData(batches, example, net))


def changed(calibration: Calibration, chosen: list[str]) -> list[Change]:
    out = []
    for name in chosen:
        reader, weight = calibration.readers[name], calibration.weights[name]
        features, outputs = weight.shape[reader.in_axis], weight.shape[reader.out_axis]
        change = 0.1 * torch.randn(1, features, outputs, dtype=torch.float64)
        out.append(Change(reader, change, 0.1 * torch.randn(1, outputs, dtype=torch.float64)))
    return out


def outputs(net: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    out: list[Tensor] = []
    for batch in batches:
        with evaluating(net):
            out += [t.double() for t in flatten_tensors(net(batch.clone())) if t.is_floating_point()]
    return out


def by_hand(net: nn.Module, batches: list[Tensor], changes: list[Change]) -> float:
    other = copy.deepcopy(net)
    for change in changes:
        layer = other.get_submodule(change.reader.weight.rpartition(".")[0])
        layer.weight.data += change.weights[0].T.float()
        bias = layer.bias.data if layer.bias is not None else torch.zeros(len(layer.weight))
        layer.bias = nn.Parameter(bias + change.shift[0].float())
    both = zip(outputs(net, batches), outputs(other, batches), strict=True)
    return sum(float((a - b).square().sum()) for a, b in both) / sum(len(b) for b in batches)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int, in_order: bool) -> None:
    torch.manual_seed(seed)
    choice = random.Random(seed)
    net = Network(choice.choices(STEPS_OF, k=STEPS)).eval()
    batches = [torch.randn(6, WIDTH), torch.randn(4, WIDTH)]
    calibration = calibrated(net, batches)
    before = {name: t.clone() for name, t in named_tensors(net).items()}
    names = list(calibration.readers)
    asked = [choice.sample(names, min(2, len(names))) for _ in range(6)]
    asked = sorted(asked, key=lambda chosen: min(map(names.index, chosen))) if in_order else asked
    tried = [changed(calibration, chosen) for chosen in asked]  # drawn before, as networks draw numbers too
    runs = Runs(calibration)
    for changes in tried:
        error = runs.error(changes)
        if not math.isnan(error):
            assert error == pytest.approx(by_hand(net, batches, changes), rel=1e-4, abs=1e-9)
    assert all(torch.equal(t, before[name]) for name, t in named_tensors(net).items())


def counted(net: Network, held: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[float]]:
    """Products of matrices that reach torch, as layer after layer is changed, and the errors."""
    monkeypatch.setattr(reruns, "HELD", held)
    torch.manual_seed(5)
    calibration = calibrated(net, [torch.randn(6, WIDTH)])
    runs, count = Runs(calibration), 0

    def counting(function: object) -> object:
        def called(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            return function(*args, **kwargs)  # type: ignore[operator]

        return called

    errors = []
    with monkeypatch.context() as patch:
        patch.setattr(in_context._Shifted, "made", counting(in_context._Shifted.made))
        for name in calibration.readers:
            errors.append(runs.error(changed(calibration, [name])))
    return count, errors


def test_what_stands_before_is_computed_once_while_memory_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Network([block] * STEPS).eval()
    layers = len(calibrated(net, [torch.randn(6, WIDTH)]).readers)
    started, errors = counted(net, 1 << 20, monkeypatch)
    whole, same = counted(net, 0, monkeypatch)
    assert started <= layers * (layers + 1) // 2 + layers  # from each layer on, and the way to it
    assert whole >= layers * layers
    assert errors == pytest.approx(same, rel=1e-5)


def test_large_networks_are_measured_with_fewer_shares_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network([block] * STEPS).eval()
    calibration = calibrated(net, [torch.randn(100, WIDTH)])
    layers, macs = len(calibration.readers), graphprune.count(net, torch.randn(1, WIDTH)).macs
    assert calibration.macs_per_sample == macs > 2 * STEPS * WIDTH * WIDTH
    for work, shares, samples in (
        (4 * layers * macs * 100, in_context.SHARES, 64),
        (4 * layers * macs * 20, in_context.SHARES, 20),
        (4 * layers * macs * 7, in_context.FEW_SHARES, 8),
    ):
        monkeypatch.setattr(in_context, "_WORK", work)
        assert _affordable(calibration) == (shares, samples)
        assert sum(len(e.args[0]) for e in Runs(calibrated(net, [torch.randn(100, WIDTH)]))._examples) == samples
