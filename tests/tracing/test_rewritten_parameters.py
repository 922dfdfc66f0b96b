"""Parameters that forward sets anew: from other parameters they are linked, from data they are not there yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.runtimes.export import _Assignments
from graphprune.tracing.trace import record_run


class Rep(nn.Module):
    """The weight of the fast convolution is computed from two others; `how` is the way in which it is set."""

    def __init__(self, i: int, o: int, how: str) -> None:
        super().__init__()
        self.wide, self.skip = nn.Conv2d(i, o, 3, padding=1, bias=False), nn.Conv2d(i, o, 1, bias=False)
        self.fast, self.how = nn.Conv2d(i, o, 3, padding=1, bias=False), how

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.wide(x) + self.skip(x)
        weight = self.wide.weight + F.pad(self.skip.weight, (1, 1, 1, 1))
        if self.how == "data =":
            self.fast.weight.data = weight
        elif self.how == "data.copy_":
            self.fast.weight.data.copy_(weight)
        elif self.how == "copy_":
            with torch.no_grad():
                self.fast.weight.copy_(weight)
        elif self.how == "read data":
            return F.conv2d(x, weight.data + 0 * self.fast.weight.data, None, 1, 1)
        return self.fast(x)


HOW = ["data =", "data.copy_", "copy_", "read data"]


@pytest.mark.parametrize("how", HOW)
def test_linked_parameters_are_cut_together(how: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Rep(3, 16, how), nn.ReLU(), Rep(16, 16, how), nn.ReLU(), nn.Conv2d(16, 3, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    before = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    plan = graphprune.plan(net, x, 0.5)
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert (id(tensor), True) == (before[name][0], torch.equal(tensor, before[name][1])), name
    small = plan.apply(net)
    assert small[0].wide.weight.shape == (8, 3, 3, 3) and small[2].skip.weight.shape == (8, 8, 1, 1)
    assert small[0].fast.weight.shape == (8, 3, 3, 3)
    assert graphprune.verify(net, small, plan, x).passed
    assert torch.allclose(small.eval()(x), small.train()(x), atol=1e-5)
    graphprune.prune(net, x, 0.5)


class ActNorm(nn.Module):
    """Scales set by the first batch; `how` is the way in which that is done and remembered."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__()
        self.scale, self.how = nn.Parameter(torch.zeros(channels)), how
        self.register_buffer("done", torch.tensor(0.0))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.ready if "flag" in self.how else bool(self.done > 0)):
            value = -torch.log(x.std(0) + 1e-6).detach()
            if "data =" in self.how:
                self.scale.data = value
            elif "data.copy_" in self.how:
                self.scale.data.copy_(value)
            else:
                with torch.no_grad():
                    self.scale.copy_(value)
            self.ready = True
            self.done = torch.tensor(1.0)
        return x * self.scale.exp()


WAYS = ["data =", "data.copy_", "copy_", "data =, flag", "data.copy_, flag", "copy_, flag"]


def flow(how: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), ActNorm(16, how), nn.Linear(16, 3), ActNorm(3, how)).eval()


@pytest.mark.parametrize("how", WAYS)
def test_a_first_run_that_sets_parameters_is_found_and_undone(how: str) -> None:
    net, x = flow(how), torch.randn(6, 4)
    before = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    assert record_run(net, x).initialised == ("2.scale", "4.scale")
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert (id(tensor), True) == (before[name][0], torch.equal(tensor, before[name][1])), name
    assert not net[2].ready


@pytest.mark.parametrize("how", WAYS)
def test_it_is_said_and_not_pruned_before_it_has_seen_data(how: str) -> None:
    net, x = flow(how), torch.randn(6, 4)
    with pytest.warns(graphprune.GraphPruneWarning, match=r"2\.scale"):
        plan = graphprune.plan(net, x, 0.5)
    with pytest.raises(graphprune.GraphPruneError, match=r"2\.scale"):
        graphprune.prune(net, x, 0.5)
    with pytest.raises(graphprune.GraphPruneError, match=r"2\.scale"):
        graphprune.verify(net, plan.apply(net), plan, x)
    assert not net[2].ready and not net[2].done
    net(x)
    assert not record_run(net, x).initialised
    small = graphprune.prune(net, x, 0.5)
    assert small[0].weight.shape == (8, 4) and small[2].scale.shape == (8,)


def test_what_training_sets_is_nothing_of_the_kind() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mean, self.head = nn.Linear(4, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.layer(x)
            if self.training:
                self.mean.data.lerp_(h.mean(0), 0.1)
            return self.head(h - self.mean)

    net, x = Codebook(), torch.randn(5, 4)
    assert not record_run(net, x, training_paths=True).initialised
    assert len(graphprune.prune(net, x, 0.5).layer.weight) == 4 and not net.mean.any()


def test_an_export_names_them() -> None:
    net = nn.Sequential(Rep(3, 8, "data ="), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    with _Assignments() as assigned, torch.no_grad():
        net(torch.randn(1, 3, 8, 8))
    with pytest.raises(graphprune.GraphPruneError, match=r"0\.fast\.weight: forward sets its \.data"):
        assigned.check(net)
    with _Assignments() as assigned, torch.no_grad():
        net[2](torch.randn(1, 8, 8, 8))
    assigned.check(net)
