"""Means and variances from stored statistics, against integrals by other means and against data that have them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate as scipy_integrate
from scipy import stats
from torch import Tensor, nn

import graphprune
from graphprune.importance.calibration import find_readers
from graphprune.importance.calibration.stored import Spread, StoredStatistics, clipped, integrate, stored_spreads
from graphprune.support.walking import named_tensors
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "relu": (torch.relu, (0.0,)),
    "relu6": (F.relu6, (0.0, 6.0)),
    "leaky_relu": (F.leaky_relu, (0.0,)),
    "hardswish": (F.hardswish, (-3.0, 3.0)),
    "gelu": (F.gelu, ()),
    "silu": (F.silu, ()),
    "sigmoid": (torch.sigmoid, ()),
}
NORMALS = [(0.0, 1.0), (-1.3, 0.4), (2.0, 3.0), (5.9, 0.2), (0.7, 0.0), (-30.0, 1.0)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integrals(name: str) -> None:
    function, bends = FUNCTIONS[name]
    mean = torch.tensor([m for m, _ in NORMALS], dtype=torch.float64)
    variance = torch.tensor([s * s for _, s in NORMALS], dtype=torch.float64)
    first, second = integrate(function, mean, variance, bends)
    for i, (m, s) in enumerate(NORMALS):

        def value(x: float, power: int) -> float:
            return float(function(torch.tensor(x, dtype=torch.float64))) ** power

        if s == 0:
            assert float(first[i]) == pytest.approx(value(m, 1), rel=1e-9) and float(second[i]) == pytest.approx(0)
            continue
        points = [p for p in (*bends, m) if m - 9 * s < p < m + 9 * s]
        wanted = [
            scipy_integrate.quad(
                lambda x, p=p, m=m, s=s: value(x, p) * stats.norm.pdf(x, m, s), m - 9 * s, m + 9 * s, points=points,
                limit=400,
            )[0]
            for p in (1, 2)
        ]  # fmt: skip
        assert float(first[i]) == pytest.approx(wanted[0], rel=1e-6, abs=1e-9)
        assert float(second[i]) == pytest.approx(wanted[1] - wanted[0] ** 2, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)])
def test_the_closed_form_of_a_clipped_normal(low: float, high: float) -> None:
    mean, deviation = torch.linspace(-9, 9, 37, dtype=torch.float64), torch.tensor([0.8, 3.0]).double()[:, None]
    m, v = torch.broadcast_tensors(mean, deviation.square())
    bends = tuple(end for end in (low, high) if math.isfinite(end))
    found, wanted = clipped(m, v, low, high), integrate(lambda x: x.clamp(low, high), m, v, bends)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def spreads_read(model: nn.Module, example: Tensor) -> dict[str, Spread]:
    """What each layer with a weight reads, by the name of the weight."""
    trace = record_run(model, ExampleInput.of(example))
    nodes = {r.weight: next(iter(trace.parameters[r.weight].users)).args[0] for r in find_readers(trace)}
    found = stored_spreads(trace, named_tensors(model), frozenset(nodes.values()))
    return {name: found[node] for name, node in nodes.items()}


class Kinds(nn.Module):
    """Batch norms of independent normal numbers (their inputs are), and everything that is carried on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.after_relu, self.after_sum = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.after_gate, self.after_cat = nn.Conv2d(4, 3, 1), nn.Conv2d(8, 3, 1)
        self.after_layer, self.head = nn.Conv2d(3, 2, 1), nn.Linear(4 * 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x[:, :4]), self.b(x[:, 4:])
        rows = F.silu(a).mean(3).flatten(1)
        out = self.after_sum((a + b).relu()) + self.after_gate(a.relu() * torch.sigmoid(b))
        out = out + self.after_cat(torch.cat([F.hardswish(a), b * 0.5 + 1], 1))
        return out + self.after_layer(self.after_relu(a.relu())).sum(1, keepdim=True) + self.head(rows).sum()


def kinds() -> nn.Module:
    torch.manual_seed(0)
    model = Kinds().eval()
    with torch.no_grad():
        for norm in (model.a, model.b):
            norm.weight.copy_(torch.rand(4) + 0.5)
            norm.bias.copy_(torch.randn(4))
            norm.running_mean.copy_(torch.randn(4))
            norm.running_var.copy_(torch.rand(4) + 0.5)
    return model


def test_against_data_that_have_these_statistics() -> None:
    model = kinds()
    spreads = spreads_read(model, torch.randn(2, 8, 6, 6))
    generator = torch.Generator().manual_seed(1)
    norms = [model.get_submodule(name) for name in "ab"]
    mean, variance = (torch.cat([getattr(n, f"running_{k}") for n in norms]) for k in ("mean", "var"))
    view = (1, 8, 1, 1)
    x = torch.randn(4000, 8, 6, 6, generator=generator) * variance.sqrt().view(view) + mean.view(view)
    read: dict[str, Tensor] = {}
    for name in spreads:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: read.__setitem__(name, args[0].double()))
    with torch.no_grad():
        model(x)
    assert set(read) == set(spreads) and len(read) == 6
    for name, spread in spreads.items():
        found = read[name]
        assert spread.mean.shape[1:] == found.shape[1:]
        wanted, error = found.mean(0), found.std(0) / math.sqrt(len(found))
        assert bool(((spread.mean[0] - wanted).abs() <= 6 * error + 1e-6).all()), name
        if name == "head.weight":  # a mean over places: its variance is a bound
            assert bool((spread.variance[0] >= found.var(0)).all())
            continue
        variances = spread.variance[0].mean((1, 2)), found.var(0).mean((1, 2))
        torch.testing.assert_close(*variances, rtol=0.05, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_not_known_is_not_made_up() -> None:
    torch.manual_seed(0)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(2), nn.Conv2d(5, 2, 1)
            self.third = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.third(self.second(torch.cat([self.first(x).relu(), self.norm(x)], 1)))
            return out

    spreads = spreads_read(Part().eval(), torch.randn(1, 2, 4, 4))
    assert bool(spreads["first.weight"].mean.isnan().all()) and bool(spreads["third.weight"].mean.isnan().all())
    known = ~spreads["second.weight"].mean[0, :, 0, 0].isnan()
    assert known.tolist() == [False, False, False, True, True]
    batch = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    assert bool(spreads_read(batch.eval(), torch.randn(4, 3))["1.weight"].mean.isnan().all())


def test_one_number_for_all_places() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).eval()
    spread = spreads_read(model, torch.randn(1, 3, 64, 64))["2.weight"]
    assert spread.mean.shape == (1, 3, 64, 64) and spread.mean.stride()[2:] == (0, 0)


class Mlp(nn.Module):
    """What many a transformer layer ends with."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(200, elementwise_affine=affine)
        self.up, self.down = nn.Linear(200, 12), nn.Linear(12, 200)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_are_assumed_to_treat_their_features_alike_and_only_to_rank(affine: bool) -> None:
    torch.manual_seed(0)
    model, x = Mlp(affine).eval(), torch.randn(20000, 200)
    with torch.no_grad():
        model.up.weight.mul_(torch.linspace(0.1, 4, 12)[:, None])
        if affine:
            model.norm.weight.uniform_(0.5, 2)
            model.norm.bias.normal_()
        wanted = F.gelu(model.up(model.norm(x))).double().var(0)
    trace = record_run(model, ExampleInput.of(x[:2]))
    found = StoredStatistics(trace, named_tensors(model)).variance("down.weight")
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=1e-4)
    known = spreads_read(model, x[:2])["down.weight"]
    assert bool(known.mean.isnan().all()) and bool(known.variance.isnan().all())
    plan = graphprune.plan(model, x[:2], 0.5)
    (said,) = graphprune.recover(model, plan, x[:2]).layers
    assert not said.changed and "nothing is stored" in said.note
