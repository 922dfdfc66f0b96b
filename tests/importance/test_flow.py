"""The default criterion: against loops over the formula, and on networks whose order is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.importance import ImportanceContext, resolve_criterion
from graphprune.importance.calibration.stored import StoredStatistics
from graphprune.importance.scorer import Scorer
from graphprune.support.walking import named_tensors


class Residual(nn.Module):
    """A stream that three layers read, inner channels behind a norm, and features flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.norm, self.down = nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 6, 1)
        self.side, self.head = nn.Conv2d(6, 4, 1), nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.down(self.norm(self.up(x)).relu())
        return self.head(x.flatten(1)), self.side(x)


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Residual().eval()
    with torch.no_grad():
        for norm in (net.stem_norm, net.norm):
            norm.weight.uniform_(0.2, 2)
            norm.bias.normal_()
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net, torch.randn(2, 3, 2, 2)


def test_the_formula_by_loops() -> None:
    net, x = network()
    graph = graphprune.trace(net, x)
    tensors = named_tensors(net)
    stored = StoredStatistics(graph.trace, tensors)
    scores = Scorer(net, [], resolve_criterion(), 0, False, None, trace=graph.trace)(graph)
    assert len(graph.groups) == 2
    for group in graph.groups:
        wanted = np.zeros(group.size)
        for member in group.members:
            if member.role != "in":
                continue
            weight, variance = tensors[member.parameter].detach().double(), stored.variance(member.parameter)
            assert variance is not None
            energy = []
            for unit in member.positions.tolist():
                total = 0.0
                for index in unit:
                    deviation = 1.0 if bool(variance.isnan().any()) else float(variance[index]) ** 0.5
                    total += deviation * sum(v * v for v in weight.select(member.axis, index).flatten().tolist())
                energy.append(total)
            if bool(variance.isnan().any()):  # none of these filters is short
                assert min(norms_of(group, tensors)) > 0.1
            wanted += np.array(energy) / sum(energy)
        np.testing.assert_allclose(scores[group.index], wanted, rtol=1e-5)
        readers = sum(member.role == "in" for member in group.members)
        assert scores[group.index].sum() == pytest.approx(readers)


def norms_of(group: graphprune.Group, tensors: dict[str, Tensor]) -> list[float]:
    """Norms of what makes the units, relative to their root mean square."""
    norms = []
    for member in group.members:
        weight = tensors[member.parameter].detach()
        if member.role == "out" and weight.dim() > 1:
            found = torch.stack([weight.select(member.axis, i).norm() for i in member.positions[:, 0].tolist()])
            norms.append((found / found.square().mean().sqrt()).tolist())
    return [sum(v * v for v in column) ** 0.5 for column in zip(*norms, strict=True)]


def test_dead_filters_go_first() -> None:
    torch.manual_seed(0)
    for size in (0.0, 1e-4):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        with torch.no_grad():
            net[0].weight[::2] *= size
        assert graphprune.plan(net, torch.randn(1, 4), 0.5).removed["0.weight"][0] == (0, 2, 4)


def test_without_statistics_the_weights_of_the_next_layer_decide() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = graphprune.plan(net, torch.randn(1, 4), 0.5)
    norms = net[2].weight.detach().square().sum(0)
    assert plan.removed["0.weight"][0] == tuple(sorted(norms.argsort()[:3].tolist()))


def test_a_channel_that_hardly_varies_goes_first() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        net[3].weight.fill_(1.0)
        net[1].weight.copy_(torch.tensor([1.0, 1e-3, 1.0, 1.0, 1.0, 1.0]))
        net[1].bias.copy_(torch.tensor([0.0, 5.0, 0.0, -9.0, 0.0, 0.0]))  # one is constant, one is never there
    plan = graphprune.plan(net, torch.randn(1, 3, 4, 4), 1 / 3)
    assert plan.removed["0.weight"][0] == (1, 3)


def test_a_group_that_nothing_reads_is_judged_by_its_own_weights() -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    graph = graphprune.trace(net, (x, x, x))
    scores = Scorer(net, [], resolve_criterion("flow"), 0, False, None, trace=graph.trace)(graph)
    for group in graph.groups:
        assert scores[group.index].shape == (group.size,) and (scores[group.index] > 0).all()
        if not any(member.role == "in" for member in group.members):
            assert scores[group.index].sum() == pytest.approx(1)


def test_zeros_and_nan() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = graphprune.trace(net, torch.randn(1, 4))
    (group,) = graph.groups
    with torch.no_grad():
        net[2].weight.zero_()
    context = ImportanceContext(net, named_tensors(net))
    np.testing.assert_allclose(resolve_criterion("flow")(context, group), np.full(6, 1 / 6))
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(graphprune.GraphPruneError, match=r"NaN or infinite values in '2\.weight'"):
        graphprune.plan(net, torch.randn(1, 4), 0.5)


@pytest.mark.parametrize("name", ["l1", "l2", "lamp"])
def test_norms_see_weights_as_they_stand_and_folded_ones_on_request(name: str) -> None:
    net, x = network()
    with torch.no_grad():
        scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
        net.up.weight.div_(net.up.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        net.up.weight.mul_(torch.linspace(1, 2, 10).view(-1, 1, 1, 1))
    own = graphprune.plan(net, x, {"up": 0.3}, criterion=name, round_to=1).removed["up.weight"][0]
    assert own == (0, 1, 2) or name == "l1"
    norms = net.up.weight.flatten(1).norm(p=1 if name == "l1" else 2, dim=1)
    assert own == tuple(sorted(norms.argsort()[:3].tolist()))
    folded = graphprune.plan(net, x, {"up": 0.3}, criterion=f"{name}_folded", round_to=1).removed["up.weight"][0]
    assert folded == tuple(sorted((norms * scale.abs()).argsort()[:3].tolist()))


def test_scales_and_masks_count_where_nothing_is_stored() -> None:
    """x g with weights of one size: |g| decides; what g is added to, not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.register_buffer("mask", torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).reshape(1, 6, 1, 1))
            self.scale = nn.Parameter(torch.tensor([9.0, -0.1, 2.0, 9.0, -3.0, 1.0]).reshape(1, 6, 1, 1))
            self.shift = nn.Parameter(torch.tensor([5.0, 0.0, 0.0, 5.0, 0.0, 0.0]).reshape(1, 6, 1, 1))
            with torch.no_grad():
                for parameter in (*self.first.parameters(), *self.last.parameters()):
                    parameter.fill_(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x) * self.mask * self.scale + self.shift)

    net, example = Net().eval(), torch.randn(1, 3, 4, 4)
    order = [graphprune.plan(net, example, n / 6, criterion="flow", round_to=1).removed for n in (2, 3, 4)]
    assert [removed["first.weight"][0] for removed in order] == [(0, 3), (0, 1, 3), (0, 1, 3, 5)]


class Told(nn.Module):
    """Numbers leave the tensors behind layers and norms, and come back."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 16), norm, nn.Linear(16, 16), nn.Linear(16, 3)
        self.d, self.e = nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        sums, scale = h.sum([1]).tolist(), 1 + h.sum((0, 1)).item()
        h = self.b(h * torch.tensor(sums)[:, None] / scale).relu()
        y = self.c(h) * h.amax([0, 1]).item() + torch.tensor(h.sum([1]).tolist())[:, None]
        return self.e(self.d(y).relu())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.LayerNorm(16), nn.Identity()])
def test_numbers_that_leave_the_tensors_are_no_error(norm: nn.Module) -> None:
    net, x = Told(norm).eval(), torch.randn(4, 8)
    plan = graphprune.plan(net, x, 0.5, criterion="flow")
    assert plan.removed.keys() >= {"d.weight", "e.weight"} and plan.apply(net)(x).shape == (4, 2)
