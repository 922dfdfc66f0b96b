"""Repairs without data are tried on a twin, and what makes that worse is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.recovery.repair import stored, without_data
from graphprune.recovery.repair.likely import drawn, twin
from graphprune.support.walking import named_tensors
from graphprune.tracing.example import ExampleInput

SHAPE = (3, 12, 12)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.m = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.m(self.b(self.n(self.a(x)).relu()))).relu()


def trained(seed: int, *, statistics: bool = True) -> nn.Module:
    """With the statistics of data, as training leaves them."""
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Block(16), nn.MaxPool2d(2), Block(16)]
    net = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.3, 1.5)
            norm.bias.normal_(0, 0.5)
            norm.momentum = None
        if statistics:
            net.train()(torch.randn(256, *SHAPE))
    return net.eval()


@torch.no_grad()
def error(net: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return float((net(x) - dense(x)).square().sum() / dense(x).square().sum())


@pytest.mark.parametrize("method", ["mean", "moments"])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_on_the_data_whose_statistics_are_stored(seed: int, method: str) -> None:
    net, fresh = trained(seed), torch.randn(256, *SHAPE)
    plan = graphprune.plan(net, fresh[:2], 0.4)
    cut = plan.apply(net)
    found = graphprune.recover(net, plan, fresh[:2], method=method)
    before, after = error(cut, net, fresh), error(found.model, net, fresh)
    assert found.checked == "64 random samples that have the stored statistics" and found.after <= found.before
    if (seed, method) == (2, "mean"):  # this is what the means alone make worse, by a fifth
        assert str(found).count("mean taken back with all else: on 64 random samples") >= 3
        assert "nothing was repaired" in str(found) and after == before
        assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), cut.parameters(), strict=True))
    else:
        assert after < before and after / before == pytest.approx(found.after / found.before, rel=0.2)


def test_what_a_twin_does_not_take_is_reduced_to_means(monkeypatch: pytest.MonkeyPatch) -> None:
    spread_out = stored._spread_out

    def wild(small: nn.Module, *args: Any) -> None:
        spread_out(small, *args)
        for name, tensor in named_tensors(small).items():
            if name.endswith("weight") and tensor.dim() == 4:
                tensor.data.mul_(3)

    net, x = trained(0), torch.randn(2, *SHAPE)
    plan = graphprune.plan(net, x, 0.4)
    wanted = graphprune.recover(net, plan, x, method="mean").model
    monkeypatch.setattr(stored, "_spread_out", wild)
    found = graphprune.recover(net, plan, x, method="moments")
    assert all("moments taken back with all else" in layer.note for layer in found.layers if layer.changed)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), wanted.parameters(), strict=True))


def test_the_twin_stores_what_its_inputs_make() -> None:
    net = trained(0)
    inputs = drawn(net, ExampleInput.of(torch.randn(2, *SHAPE) * 3 + 1), 10**6)
    other, seen = twin(net, inputs), {}
    (x,) = inputs.example.args
    assert x.shape == (64, *SHAPE) and x.mean() == pytest.approx(1, abs=0.3) and x.std() == pytest.approx(3, rel=0.1)
    for name, module in other.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: (m, args[0])}))
    with torch.no_grad():
        other(x)
    for norm, read in seen.values():
        torch.testing.assert_close(norm.running_mean, read.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, read.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    ours, theirs = (dict(m.named_parameters()) for m in (net, other))
    assert len(seen) == 5 and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_networks_that_have_seen_no_data_are_checked_as_they_are() -> None:
    """Statistics that were never gathered say nothing: what a repair by them does is seen on random inputs."""
    for seed in range(6):
        net, fresh = trained(seed, statistics=False), torch.randn(256, *SHAPE)
        plan = graphprune.plan(net, fresh[:2], 0.4)
        found = graphprune.recover(net, plan, fresh[:2], method="mean")
        assert found.checked == "64 random samples"
        assert error(found.model, net, fresh) <= 1.005 * error(plan.apply(net), net, fresh)


def test_a_network_that_fails_on_random_inputs_is_repaired_and_the_report_says_that_nothing_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any) -> Any:
        raise graphprune.GraphPruneError("example_input: no")

    monkeypatch.setattr(without_data, "drawn", refused)
    net, x = trained(1), torch.randn(2, *SHAPE)
    found = graphprune.recover(net, graphprune.plan(net, x, 0.4), x)
    assert found.unchecked == "example_input: no" and str(found).endswith("not checked: example_input: no")
    assert any(layer.changed for layer in found.layers)
