"""Recovery: exact where it can be, against slow references elsewhere, and honest about the rest."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from tests.oracles import relative_error


def copy_units(tensors: list[tuple[Tensor, int]], source: int, target: int) -> None:
    """Make unit `target` produce what unit `source` does."""
    with torch.no_grad():
        for tensor, axis in tensors:
            tensor.select(axis, target).copy_(tensor.select(axis, source))


class Chain(nn.Module):
    """Convolution with taps, grouped convolution, concat and flatten: in every pair of units one is redundant."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=padding)
        self.b = nn.Conv2d(6, 8, 3, padding=padding, groups=2)
        self.c = nn.Conv2d(8, 4, 3, stride=2, bias=False)
        self.d = nn.Conv2d(8, 4, 3, stride=2, padding=padding)
        self.e = nn.Conv2d(12, 6, 1)
        self.f = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        y = self.c(nn.functional.pad(x, (1, 1, 1, 1))).relu()
        x = torch.cat([y, self.d(x).relu(), x[:, :4, ::2, ::2]], 1)
        return self.f(self.e(x).relu().flatten(1))


def redundant_chain() -> Chain:
    net = Chain().eval()
    for i in (0, 1, 2):
        copy_units([(net.a.weight, 0), (net.a.bias, 0)], i, i + 3)  # across the groups of b
    for i in (0, 2):
        copy_units([(net.c.weight, 0)], i, i + 1)
        copy_units([(net.d.weight, 0), (net.d.bias, 0)], i, i + 1)
    nn.init.constant_(net.e.bias, 0.5)  # type: ignore[arg-type]  # no unit is dead, which would be redundant too
    for i in (0, 2, 4):
        copy_units([(net.e.weight, 0), (net.e.bias, 0)], i, i + 1)
    return net


class Tokens(nn.Module):
    """A transformer block whose heads and neurons come in equal pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            for tensor in (self.qkv.weight, self.qkv.bias):
                parts = tensor.view(3, 4, 4, -1)
                parts[:, 1], parts[:, 3] = parts[:, 0], parts[:, 2]
            for tensor in (self.up.weight, self.up.bias):
                tensor[1::2] = tensor[::2]

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 4 * self.heads)
        x = x + self.out(y)
        return x + self.down(self.up(self.norm(x)).relu())


def prune_pairs(net: nn.Module, x: Tensor, **options: Any) -> graphprune.Plan:
    return graphprune.plan(net, x, 0.5, criterion="reconstruction", data=[x], **options)


def test_redundant_channels_go_without_loss() -> None:
    net, x = redundant_chain(), torch.randn(300, 3, 8, 8)
    plan = graphprune.plan(net, x[:2], {"c": 0.5, "d": 0.5, "e": 0.5}, criterion="reconstruction", data=[x])
    assert {n: len(plan.removed[n][0]) for n in ("c.weight", "d.weight", "e.weight")} == {
        "c.weight": 2, "d.weight": 2, "e.weight": 3,
    }  # fmt: skip
    for name, pairs in (("c.weight", 2), ("d.weight", 2), ("e.weight", 3)):
        assert {i // 2 for i in plan.removed[name][0]} == set(range(pairs))  # one of each pair
    found = graphprune.recover(net, plan, x[:2], list(x.split(100)), ridge=1e-9)
    assert relative_error(plan.apply(net)(x), net(x)) > 1e-2
    assert relative_error(found.model(x), net(x)) < 1e-3
    assert all(layer.after < 1e-6 for layer in found.layers)


def test_units_across_the_groups_of_a_grouped_convolution() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    copy_units([(net[0].weight, 0), (net[0].bias, 0)], 0, 1)
    copy_units([(net[0].weight, 0), (net[0].bias, 0)], 4, 5)
    x = torch.randn(200, 3, 7, 7)
    plan = graphprune.plan(net, x[:2], 0.25, criterion="reconstruction", data=[x])
    (gone,) = (plan.removed["0.weight"][0],)
    assert len(gone) == 2 and {g % 4 for g in gone} <= {0, 1}
    found = graphprune.recover(net, plan, x[:2], [x], ridge=1e-9).model
    assert relative_error(found(x), net(x)) < 1e-3


@pytest.mark.parametrize("granularity", ["heads", "channels"])
def test_heads_and_neurons(granularity: str) -> None:
    torch.manual_seed(2)
    net, x = Tokens().eval(), torch.randn(100, 6, 16)
    plan = prune_pairs(net, x, granularity=granularity, ignore=["norm"])
    name, size = ("out.weight", 8) if granularity == "heads" else ("down.weight", 6)
    assert len(plan.removed[name][1]) == size
    found = graphprune.recover(net, plan, x[:2], list(x.split(25)), ridge=1e-9).model
    assert relative_error(plan.apply(net)(x), net(x)) > 1e-2
    assert relative_error(found(x), net(x)) < 1e-3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1, bias=False) for _ in range(2))
        self.n = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for a, n, b in zip(self.a, self.n, self.b, strict=True):
            x = (b(n(a(x)).relu()) + x).relu()
        return self.fc(x.mean((2, 3)))


def residual() -> Residual:
    net = Residual()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("fold", [True, False])
def test_error_falls_on_new_inputs(fold: bool) -> None:
    net = residual()
    x, new = torch.randn(200, 3, 8, 8), torch.randn(100, 3, 8, 8)
    plan = graphprune.plan(net, x[:2], 0.4, fold_bn=fold)
    error: dict[str, float] = {}
    for method in ("mean", "least_squares"):
        made = graphprune.recover(net, plan, x[:2], list(x.split(50)), method)
        error[method] = float((made.model(new) - net(new)).square().mean())
        assert [n for n, _ in made.model.named_buffers()] == [n for n, _ in plan.apply(net).named_buffers()]
    error["nothing"] = float((plan.apply(net)(new) - net(new)).square().mean())
    assert error["least_squares"] < 0.8 * error["mean"] < 0.8 * error["nothing"]


def test_least_squares_is_the_slow_sequence_of_regressions() -> None:
    """Layer by layer with lstsq on unfolded patches, written out for this network."""
    torch.manual_seed(0)
    net = Residual()
    net.norm, net.n = nn.Identity(), nn.ModuleList([nn.Identity(), nn.Identity()])  # type: ignore[assignment]
    net = net.eval().double()
    x = torch.randn(120, 3, 6, 6).double()  # enough for the last layer, which sees one row per image
    plan = graphprune.plan(net, x[:2], {"a.*": 0.5})
    ridge = 1e-12
    got = graphprune.recover(net, plan, x[:2], [*x.split(30), x[:2]], ridge=ridge).model  # the last batch is held

    want = plan.apply(net)
    with torch.no_grad():
        dense = small = net.stem(x).relu()
        for i in range(2):
            if i:
                _refit(want.a[i], small, net.a[i](dense)[:, _kept(plan, f"a.{i}.weight")], bias=True)
            dense_inner, inner = net.a[i](dense).relu(), want.a[i](small).relu()
            _refit(want.b[i], inner, net.b[i](dense_inner) + dense - small)
            dense, small = (net.b[i](dense_inner) + dense).relu(), (want.b[i](inner) + small).relu()
        _refit(want.fc, small.mean((2, 3)), net.fc(dense.mean((2, 3))))
        torch.testing.assert_close(got(x), want(x), rtol=1e-4, atol=1e-5)


def _kept(plan: graphprune.Plan, name: str) -> list[int]:
    return [i for i in range(plan.structure[name][0]) if i not in plan.removed[name][0]]


def _refit(layer: Any, x: Tensor, y: Tensor, bias: bool = False) -> None:
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
        y = y.flatten(2).transpose(1, 2).flatten(0, 1)
    z = torch.cat([x, x.new_ones(len(x), 1)], 1)
    solution = torch.linalg.lstsq(z, y).solution
    layer.weight.copy_(solution[:-1].T.reshape(layer.weight.shape))
    if bias and layer.bias is None:
        layer.bias = nn.Parameter(solution[-1].clone())
    layer.bias.copy_(solution[-1])


def test_mean_is_exact_for_constant_channels_without_padding() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight[[1, 4]] = 0
        net[0].bias[[1, 4]] = torch.tensor([0.7, 1.3])
    x = torch.randn(8, 3, 9, 9)
    plan = graphprune.plan(net, x, {"0": 1 / 3})
    assert plan.removed["0.weight"][0] == (1, 4)
    assert relative_error(plan.apply(net)(x), net(x)) > 1e-2
    found = graphprune.recover(net, plan, x, [x[:4], x[4:]], "mean")
    assert relative_error(found.model(x), net(x)) < 1e-5
    assert [(layer.weight, layer.note) for layer in found.layers] == [("2.weight", "")]


def test_mean_says_where_padding_makes_it_inexact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()
    x = torch.randn(4, 3, 9, 9)
    found = graphprune.recover(net, graphprune.plan(net, x, 0.5), x, [x, x[:1]], "mean")
    assert "padded" in found.layers[0].note
    got, want = found.model(x).mean((0, 2, 3)), net(x).mean((0, 2, 3))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # on average it is exact
    assert found.layers[0].after < found.layers[0].before


@pytest.mark.parametrize("fold", [True, False])
def test_batch_norm_statistics_are_those_of_the_pruned_network(fold: bool) -> None:
    net, x = residual(), torch.randn(60, 3, 8, 8)
    plan = graphprune.plan(net, x[:2], 0.4, fold_bn=fold)
    data = list(x.split(20))
    found = graphprune.recover(net, plan, x[:2], [*data, x[:2]], "batchnorm").model  # the last batch is held
    reference = dataclasses.replace(plan, folds=()).apply(net)
    torch.optim.swa_utils.update_bn(data, reference)
    reference.eval()
    torch.testing.assert_close(found(x), reference(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in found.modules()) != fold


def test_the_model_stays_and_prune_does_it_all() -> None:
    net, x = residual(), torch.randn(64, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    net.train()
    small = graphprune.prune(
        net, x[:2], budget=graphprune.Budget(macs=0.5), criterion="reconstruction", data=[x], recover="least_squares"
    )
    assert net.training and small.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert graphprune.count(small, x[:2]).macs <= 0.5 * graphprune.count(net, x[:2]).macs
    torch.testing.assert_close(small.eval()(x).shape, net(x).shape)


GEOMETRIES = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 3), "dilation": (2, 1), "padding": (1, 0)},
    {"kernel_size": 1, "padding": 0},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_transposed_convolutions_that_lose_redundant_inputs_lose_nothing(geometry: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, **geometry)).eval()
    for i in (0, 2, 4):
        copy_units([(net[0].weight, 0), (net[0].bias, 0)], i, i + 1)
    x = torch.randn(300, 3, 6, 6)
    plan = graphprune.plan(net, x, 0.5, criterion="reconstruction", data=[x])
    assert {i // 2 for i in plan.removed["0.weight"][0]} == {0, 1, 2}  # one of each pair
    found = graphprune.recover(net, plan, x[:2], list(x.split(100)), ridge=1e-9)
    assert found.layers[-1].method == "least squares"
    assert relative_error(plan.apply(net)(x), net(x)) > 1e-2
    assert relative_error(found.model(x), net(x)) < 1e-3


def test_transposed_convolutions_of_several_groups_get_their_means_matched() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)).eval()
    x = torch.randn(8, 3, 6, 6)
    found = graphprune.recover(net, graphprune.plan(net, x, 1 / 3), x, [x, x[:1]])
    assert found.layers[0].method == "mean" and "transposed" in found.layers[0].note
    torch.testing.assert_close(found.model(x).mean((0, 2, 3)), net(x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


NO_NORM = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: graphprune.prune(n, x, recover="least_squares"), "recover='least_squares' needs inputs.*data="),
        (lambda n, x: graphprune.prune(n, x, recover="batchnorm"), "recover='batchnorm' needs inputs.*data="),
        (lambda n, x: graphprune.prune(n, x, recover="magic", data=[x]), "recover: expected one of"),
        (lambda n, x: graphprune.prune(n, x, recover="batchnorm", data=[x]), "no batch norm"),
        (lambda n, x: graphprune.prune(n, x, recover="mean", data=[]), "data: yields no batch"),
        (lambda n, x: graphprune.prune(n, x, recover="mean", data=[x[:, :2]]), "data: the model raised"),
        (lambda n, x: graphprune.prune(n, x, criterion="reconstruction"), "needs data: pass data="),
        (lambda n, x: graphprune.recover(n, graphprune.plan(n, x), x, [x], ridge=-1), "ridge"),
        (lambda n, x: graphprune.recover(n, graphprune.plan(n, x), x, None, "least_squares"), "data="),
    ],
)
def test_errors(call: Callable[[nn.Module, Tensor], Any], message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        call(copy.deepcopy(NO_NORM), torch.randn(3, 4))


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(-1, 8))


def test_modules_that_became_graphs_are_refitted_too() -> None:
    net, x = Literal().eval(), torch.randn(200, 6)
    plan = graphprune.plan(net, x[:2], 0.5, output="graph", criterion="reconstruction", data=[x])
    assert len(plan.removed["b.weight"][1]) == 4
    found = graphprune.recover(net, plan, x[:2], [x])
    assert [layer.weight for layer in found.layers] == ["b.weight"]
    cut = float((plan.apply(net)(x) - net(x)).square().mean().detach())
    assert float((found.model(x) - net(x)).square().mean().detach()) < 0.8 * cut
