"""Rows against the layer itself: whatever the geometry, rows times weights are the layer's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.importance.calibration import (
    CalibrationData,
    Moments,
    Reader,
    find_readers,
    observe,
    rows_of,
    weight_matrix,
)
from graphprune.importance.calibration import moments as module
from graphprune.importance.calibration.statistics import Calibration
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4), (3, 5, 6)),
    (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    (nn.Conv2d(4, 6, 3), (3, 4, 7, 8)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)), (3, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (3, 4, 7, 8)),
    (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (3, 4, 7, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, stride=2), (3, 4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 7, 8)),
    (nn.Conv3d(2, 3, (1, 2, 3), padding=1, stride=2), (3, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 9)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), padding=(2, 1), dilation=(1, 2)), (3, 4, 5, 6)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 4, 3)),
]


def only_reader(layer: nn.Module, x: Tensor) -> Reader:
    (reader,) = find_readers(record_run(nn.Sequential(layer), x))
    return reader


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@pytest.mark.parametrize("positions", [64, 4])
def test_rows_times_weights_are_the_results(
    layer: nn.Module, shape: tuple[int, ...], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POSITIONS", positions)
    x = torch.randn(shape)
    reader = only_reader(layer, x)
    calls = observe(nn.Sequential(layer), [reader], ExampleInput.of(x), inputs=True, outputs=True)
    (call,) = calls[reader.weight]
    assert call.y is not None
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows, wanted = rows_of(reader, call, call.y, weight, 0)
    got = rows.double() @ weight_matrix(reader, weight)
    got += layer.bias.detach().reshape(reader.groups, 1, -1)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(got, wanted.double(), rtol=1e-4, atol=1e-5)
    sites = call.y.numel() // call.y.shape[0] // weight.shape[reader.out_axis]
    assert rows.shape[1] == shape[0] * min(positions, sites)


@pytest.mark.parametrize("count", [1, 2, 7, 256, 1000, 1024, 50176])
def test_positions_differ_and_are_in_range(count: int) -> None:
    picked = module._positions(3, count, 5, torch.device("cpu"))
    for row in picked:
        assert len(set(row.tolist())) == min(count, module.POSITIONS)
    assert int(picked.min()) >= 0 and int(picked.max()) < count


def test_sums_are_those_of_the_formula() -> None:
    x, y = torch.randn(2, 50, 3), torch.randn(2, 50, 4)
    moments = Moments(2, 3, 4)
    moments.add(x[:, :20], y[:, :20])
    moments.add(x[:, 20:], y[:, 20:])
    z = torch.cat([x, torch.ones(2, 50, 1)], 2).double()
    torch.testing.assert_close(moments.gram, torch.einsum("gni,gnj->gij", z, z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.cross, torch.einsum("gni,gnj->gij", z, y.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.variance, y.double().var(1, correction=0), rtol=1e-5, atol=1e-5)


def test_ten_batches_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POSITIONS", 10)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    x = torch.randn(20, 3, 9, 9)

    def moments(data: list[Tensor]) -> list[Moments]:
        example = ExampleInput.of(x[:1])
        made = Calibration(net, record_run(net, example), CalibrationData(data, example, net))
        return made.moments(["0.weight", "2.weight"])

    for one, ten in zip(moments([x]), moments(list(x.split(2))), strict=True):
        assert one.rows == ten.rows == 200
        torch.testing.assert_close(one.gram, ten.gram, rtol=1e-5, atol=1e-5)
