"""What the check of a repair says, against sums that are written out."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune.importance.calibration import CalibrationData
from graphprune.importance.calibration.data import ONE_INPUT
from graphprune.recovery.repair.checking import NO_OUTPUTS, Check, FitData, Measured
from graphprune.tracing.example import ExampleInput

WHOLE = torch.tensor([4.0, 1.0, 9.0, 2.0, 5.0, 3.0, 6.0, 8.0])


class Outputs(nn.Module):
    """Two outputs, one of them complex, and one without numbers to compare."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.shift * x.square()
        return x * 2, torch.complex(x, 1 - x), x.argmax(1)


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([1], 1), ([2], 1), ([7], 3), ([16], 8), ([63], 8), ([64], 8), ([200], 25), ([40, 24], 8), ([3, 3, 3, 3], 6),
        ([1] * 10, 5), ([16] * 8, 16), ([8] * 100, 96), ([64] * 200, 256), ([100, 2], 2), ([2, 100], 12),
    ],
)  # fmt: skip
def test_how_many_samples_are_held(sizes: list[int], held: int) -> None:
    batches = list(torch.arange(float(sum(sizes)))[:, None].split(sizes))
    data = FitData(CalibrationData(batches, ONE_INPUT, nn.Linear(1, 1)), nn.Linear(1, 1))
    last = torch.cat([e.args[0] for e in data.held]).flatten().tolist()
    seen = torch.cat([e.args[0] for e in data.inputs()]).flatten().tolist()
    assert len(last) == data.samples == held and last == list(range(sum(sizes) - held, sum(sizes)))
    assert seen == list(range(sum(sizes) - held if data.apart else sum(sizes)))


class Drawn:
    """Shuffles and adds noise by all sources of random numbers, with a generator that loaders are known to have."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(6, generator=self.generator).tolist():
            noise = torch.rand(4) + float(np.random.rand()) + random.random() + torch.rand(4, generator=self.generator)
            yield (100.0 * index + noise)[:, None]


@pytest.mark.parametrize("kind", ["loader", "loader with a generator", "drawn"])
def test_what_is_held_from_a_loader_that_shuffles_is_never_seen(kind: str) -> None:
    rows = TensorDataset(torch.arange(48.0)[:, None])
    generator = None if kind == "loader" else torch.Generator().manual_seed(3)
    loader = Drawn() if kind == "drawn" else DataLoader(rows, 8, shuffle=True, generator=generator)
    model = nn.Linear(1, 1)
    plain, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    data = FitData(CalibrationData(loader, ONE_INPUT, model), model)
    held = torch.cat([e.args[0] for e in data.held]).flatten().tolist()
    passes = []
    for _ in range(3):
        passes.append(torch.cat([e.args[0] for e in data.inputs()]).flatten().tolist())
        assert torch.equal(plain, torch.get_rng_state())
        torch.rand(3)
        plain = torch.get_rng_state()
    assert passes[0] == passes[1] == passes[2] and set(held).isdisjoint(passes[0])
    assert len(held) + len(passes[0]) == (24 if kind == "drawn" else 48)
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[union-attr]


def test_errors_are_those_of_each_sample_added_up() -> None:
    dense, small = Outputs(0.0), Outputs(0.1)
    batches = [torch.randn(n, 3) for n in (5, 4)]
    check = Check(dense, small, [ExampleInput.of(b) for b in batches])
    x = torch.cat(batches).double()
    places = []
    for miss, whole in ((2 * 0.1 * x**2, 2 * x), (torch.complex(0.1 * x**2, -0.1 * x**2), torch.complex(x, 1 - x))):
        places.append([float(row.abs().square().sum() / whole.abs().square().sum()) for row in miss])
    assert check.start.error == pytest.approx(sum(map(sum, places)) / 2, rel=1e-4)
    small.shift.data.fill_(0.05)  # a quarter of every sample's error
    gain, deviation = check.measured().gain_over(check.start)
    per_sample = [0.75 * (a + b) / 2 for a, b in zip(*places, strict=True)]
    assert gain == pytest.approx(sum(per_sample), rel=1e-4)
    assert deviation == pytest.approx(statistics.stdev(per_sample) * math.sqrt(9), rel=1e-3)


def measured(*misses: float) -> Measured:
    return Measured(torch.tensor([misses], dtype=torch.float64))


def after(before: Tensor, change: Tensor) -> bool:
    return Measured((before + change)[None].double()).surely_below(Measured(before[None].double()))


def test_small_gains_count_where_they_are_steady() -> None:
    steady, wild = torch.full((8,), -0.05), torch.tensor([3.0, -3.0, 2.0, -2.0, 3.0, -3.0, 1.0, -1.4])
    assert wild.sum() == pytest.approx(steady.sum().item()) and -wild.sum() < 0.05 * WHOLE.sum()
    assert after(WHOLE, steady) and not after(WHOLE, wild)
    assert not after(WHOLE, -steady) and after(WHOLE, 0 * steady)
    assert after(WHOLE, torch.tensor([3.0, -1.0, 2.0, -2.0, 0.0, -3.0, 0.0, -1.4]))  # more than a twentieth
    assert after(WHOLE[:4], wild[:4] - 0.01)  # of so few a deviation says nothing


def test_infinite_outputs_and_outputs_of_other_lengths() -> None:
    inf, nan = math.inf, math.nan
    assert not measured(1.0, inf).surely_below(measured(1.0, 1.0))
    assert measured(1.0, 5.0).surely_below(measured(1.0, inf)) and measured(0.5, inf).surely_below(measured(1.0, inf))
    assert measured(0.5, nan, 7.0).gain_over(measured(1.0, 1.0, nan))[0] == 0.5
    assert measured(0.5, nan, 7.0).where(measured(1.0, 1.0, nan)).error == 0.5
    assert math.isnan(measured(nan).where(measured(1.0)).error)


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)).relu()).argmax(1)


@pytest.mark.parametrize("method", ["mean", "moments", "least_squares", "batchnorm"])
def test_where_nothing_can_be_compared_the_report_says_so(method: str) -> None:
    net, x = Classes(), torch.randn(64, 4)
    net.train()(x)
    plan = graphprune.plan(net.eval(), x[:2], 0.5)
    found = graphprune.recover(net, plan, x[:2], None if method == "moments" else x, method)
    assert math.isnan(found.before) and math.isnan(found.after)
    assert found.unchecked == NO_OUTPUTS and f"not checked: {NO_OUTPUTS}" in str(found)
