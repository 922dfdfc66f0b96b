"""The mean correction without data: what data with the stored statistics would have said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests.oracles import relative_error


class Net(nn.Module):
    """Layers of every kind behind batch norms, whose statistics are those of independent normal inputs."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.padded = nn.Conv2d(8, 6, 3, padding=1, bias=bias)
        self.padded_norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2, bias=bias)
        self.transposed = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=bias)
        self.flat = nn.Linear(8 * 16, 5, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(x)
        y = x.relu()
        return self.padded_norm(self.padded(y)), self.grouped(y), self.transposed(y), self.flat(y.flatten(1))


class Made(nn.Module):
    """`Net` behind a layer that makes its channels: eight mixtures of as many independent ones."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1, bias=False)
        self.rest = Net(bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.rest(self.first(x))
        return out


def made(bias: bool = False) -> tuple[nn.Module, Tensor]:
    """The network and inputs with exactly its statistics, up to their number."""
    torch.manual_seed(0)
    net = Made(bias).eval()
    x = torch.randn(3000, 8, 4, 4)
    norm = net.rest.norm
    with torch.no_grad():
        z = net.first(x)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(z.mean((0, 2, 3)))
        norm.running_var.copy_(z.var((0, 2, 3)))
        norm.weight.copy_(torch.rand(8) + 0.5)
        norm.bias.copy_(torch.randn(8))
        y = net.rest.padded(net.rest.norm(z).relu())
        after = net.rest.padded_norm
        assert after.running_mean is not None and after.running_var is not None
        after.running_mean.copy_(y.mean((0, 2, 3)))
        after.running_var.copy_(y.var((0, 2, 3)))
    return net, x


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_as_from_data_with_these_statistics(fold_bn: bool, bias: bool) -> None:
    net, x = made(bias)
    plan = graphprune.plan(net, x[:2], 0.5, fold_bn=fold_bn)
    assert plan.removed["rest.grouped.weight"] and plan.removed["rest.padded.weight"][1]
    found = graphprune.recover(net, plan, x[:2], method="mean")
    wanted = graphprune.recover(net, plan, x[:2], [*x.split(600), x[:50]], "mean")  # the last batch is held
    dense, cut, repaired, known = (model(x) for model in (net, plan.apply(net), found.model, wanted.model))
    assert {layer.weight for layer in found.layers} >= {"rest.padded.weight", "rest.transposed.weight"}
    assert all(layer.note.startswith("from stored statistics") for layer in found.layers)
    for a, b, c, d in zip(dense, cut, repaired, known, strict=True):
        lost = (a.mean(0) - b.mean(0)).abs().max()
        assert lost > 0.05  # there was something to make up for
        assert (c - d).abs().max() < 0.05 * lost
    assert relative_error(dense, repaired) < relative_error(dense, cut)


def test_kept_and_folded_norms_give_the_same_function() -> None:
    net, x = made()
    folded, kept = (
        graphprune.recover(net, graphprune.plan(net, x[:2], 0.5, fold_bn=fold, criterion="l1"), x[:2]).model
        for fold in (True, False)
    )
    assert any(isinstance(m, nn.BatchNorm2d) for m in kept.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert relative_error(folded(x), kept(x)) < 1e-4


def test_what_nothing_is_known_of_is_left_alone_and_said() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 4)
    plan = graphprune.plan(net, x, 0.5)
    found = graphprune.recover(net, plan, x)
    (said,) = found.layers
    assert said.weight == "2.weight" and "nothing is stored" in said.note and "nothing is stored" in str(found)
    for a, b in zip(found.model.parameters(), plan.apply(net).parameters(), strict=True):
        assert torch.equal(a, b)


def test_prune_takes_it_and_leaves_the_model_alone() -> None:
    net, x = made()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = graphprune.prune(net, x[:2], 0.5, recover="mean")
    plain = graphprune.prune(net, x[:2], 0.5, recover=None)
    assert relative_error(net(x), small(x)) < relative_error(net(x), plain(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(graphprune.GraphPruneError, match=r"recover='batchnorm' needs inputs"):
        graphprune.prune(net, x[:2], 0.5, recover="batchnorm")


def test_a_layer_that_runs_twice_gets_the_mean_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            return self.last(self.a(x).relu()), self.last(self.b(x).relu())

    torch.manual_seed(0)
    net = Twice().eval()
    with torch.no_grad():
        for norm in (net.a, net.b):
            norm.bias.copy_(torch.randn(6))
            norm.running_mean.copy_(torch.randn(6))  # type: ignore[union-attr]
    x = torch.randn(1, 3, 4, 4)
    plan = graphprune.plan(net, x, 0.5, fold_bn=False)
    gone = list(plan.removed["last.weight"][1])
    found = graphprune.recover(net, plan, x).model
    change = found.get_parameter("last.bias") - net.last.bias
    wanted = torch.zeros(2, dtype=torch.float64)
    for norm in (net.a, net.b):
        m, s = norm.bias.detach().double(), (norm.running_var.double() / (norm.running_var.double() + norm.eps)).sqrt()
        z = m / s
        mean = m * torch.special.ndtr(z) + s * torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
        wanted += net.last.weight.detach().double()[:, gone, 0, 0] @ mean[gone] / 2
    torch.testing.assert_close(change.double(), wanted, rtol=1e-4, atol=1e-6)


def test_layers_left_out_need_data() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.blocks:
                x = x + part(x)
            out: Tensor = self.head(x)
            return out

    net, x = Residual().eval(), torch.randn(3, 4)
    plan = graphprune.plan(net, x, 0.5, granularity="layer", criterion="magnitude")
    assert len(plan.layers) == 1
    with pytest.raises(graphprune.GraphPruneError, match="what layers that are left out made is stored nowhere"):
        graphprune.recover(net, plan, x)


@pytest.mark.parametrize("fold_bn", [True, False])
def test_moments_give_results_behind_norms_their_old_variance(fold_bn: bool) -> None:
    """Channels are independent here, so that what is assumed is so: an orthogonal mixture of independent inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1),
    ).eval()  # fmt: skip
    x = torch.randn(4000, 8, 5, 5)
    with torch.no_grad():
        nn.init.orthogonal_(net[0].weight.view(8, 8))
        for index in (1, 4):  # statistics of these inputs
            norm, z = net[index], net[:index](x)
            norm.running_mean.copy_(z.mean((0, 2, 3)))
            norm.running_var.copy_(z.var((0, 2, 3)))
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        plan = graphprune.plan(net, x[:2], {"0": 0.5}, fold_bn=fold_bn, round_to=1)
        assert plan.removed["3.weight"][1] and 0 not in plan.removed["3.weight"]
        dense, cut = (model(x) for model in (net[:5], plan.apply(net)[:5]))
        repaired = {m: graphprune.recover(net, plan, x[:2], method=m).model for m in ("mean", "moments")}
        mean, moments = (repaired[m][:5](x) for m in ("mean", "moments"))
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    want, none, half, full = (y[inner].var((0, 2, 3)) for y in (dense, cut, mean, moments))
    assert bool((none < 0.9 * want).all()) and torch.allclose(half, none, rtol=1e-4)
    torch.testing.assert_close(full, want, rtol=0.05, atol=0)
    torch.testing.assert_close(moments.mean((0, 2, 3)), mean.mean((0, 2, 3)), rtol=0, atol=0.02)


def test_moments_look_at_no_data_and_folded_norms_make_no_difference() -> None:
    net, x = made()
    plans = [graphprune.plan(net, x[:2], 0.5, fold_bn=fold) for fold in (True, False)]
    folded, kept = (graphprune.recover(net, plan, x[:2], [x[:9]], "moments") for plan in plans)
    alone = graphprune.recover(net, plans[0], x[:2])
    assert relative_error(folded.model(x), kept.model(x)) < 1e-4
    assert relative_error(folded.model(x), alone.model(x)) == 0
    methods = {layer.weight: layer.method for layer in alone.layers}
    assert methods["rest.padded.weight"] == "moments" and methods["rest.flat.weight"] == "mean"
