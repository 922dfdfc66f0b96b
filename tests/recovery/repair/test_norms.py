"""Batch norms that a plan keeps: the fit is the one of the folded network, and training can go on from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune


class Net(nn.Module):
    """Residual blocks with batch norms before the additions, a transposed and a linear layer with their own."""

    def __init__(self, width: int, blocks: int, bias: bool, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.first = nn.BatchNorm2d(width)
        self.a = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1, bias=bias) for _ in range(blocks))
        self.na = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Conv2d(8, width, 3, padding=1, groups=groups, bias=bias) for _ in range(blocks))
        self.nb = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))
        self.up = nn.ConvTranspose2d(width, 6, 2, 2, bias=bias)
        self.nu = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 8, bias=bias)
        self.nf = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x)).relu()
        for a, na, b, nb in zip(self.a, self.na, self.b, self.nb, strict=True):
            x = (nb(b(na(a(x)).relu())) + x).relu()
        x = self.nu(self.up(x)).relu().mean((2, 3))
        return self.out(self.nf(self.fc(x)).relu())


def trained(net: nn.Module, x: Tensor) -> nn.Module:
    """Statistics of the data, scales of both signs, one of them zero."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            module.momentum = 1.0
            if module.affine:
                nn.init.uniform_(module.weight, -0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.weight.data[0] = 0
    with torch.no_grad():
        net.train()(x)
    return net.eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return float((a - b).norm() / b.norm()) < tolerance


@settings(max_examples=12)
@given(st.sampled_from([4, 6]), st.integers(1, 2), st.booleans(), st.sampled_from([1, 2]), st.integers(0, 99))
def test_the_function_is_that_of_the_folded_fit(width: int, blocks: int, bias: bool, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(96, 3, 6, 6)
    net = trained(Net(width, blocks, bias, groups).double(), x.double())
    data = list(x.double().split(48))
    for method in ("mean", "least_squares"):
        made = []
        for fold in (True, False):
            plan = graphprune.plan(net, data[0][:2], 0.4, fold_bn=fold)
            made.append(graphprune.recover(net, plan, data[0][:2], data, method).model)
        folded, kept = made
        assert sum(isinstance(m, nn.BatchNorm2d) for m in kept.modules()) == 2 * blocks + 2
        with torch.no_grad():
            assert close(kept(data[0]), folded(data[0]), 1e-6), method
        assert [n for n, _ in kept.named_parameters()] == [n for n, _ in plan.apply(net).named_parameters()]


def test_training_goes_on_where_the_fit_ended() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3, 6, 6)
    net = trained(Net(6, 2, False, 1), x)
    plan = graphprune.plan(net, x[:2], 0.4, fold_bn=False)
    found = graphprune.recover(net, plan, x[:2], [x, x[:2]]).model  # the last batch is held
    with torch.no_grad():
        wanted = found.eval()(x)
        got = found.train()(x)  # the statistics of this batch are those kept, but for n - 1
    assert close(got, wanted, 1e-2)


def test_filters_keep_their_norms_and_scales_their_signs() -> None:
    torch.manual_seed(1)
    x = torch.randn(200, 3, 6, 6)
    net = trained(Net(6, 1, True, 1), x)
    plan = graphprune.plan(net, x[:2], 0.4, fold_bn=False)
    cut, found = plan.apply(net), graphprune.recover(net, plan, x[:2], list(x.split(50))).model
    for name, axis in (("b.0", 0), ("up", 1), ("fc", 0)):
        before, after = (m.get_submodule(name).weight.detach().movedim(axis, 0).flatten(1) for m in (cut, found))
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-4, atol=1e-6)
        assert not close(after, before)
    for name in ("nb.0", "nu", "nf"):
        before, after = (m.get_submodule(name).weight.detach() for m in (cut, found))
        assert bool((after.sign()[before != 0] == before.sign()[before != 0]).all())


@pytest.mark.parametrize("affine", [True, False])
def test_norms_that_cannot_express_every_scale_stay_as_they_are(affine: bool) -> None:
    torch.manual_seed(2)
    x = torch.randn(200, 3, 6, 6)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    trained(net, x)
    plan = graphprune.plan(net, x[:2], 0.5, ignore=["2"], fold_bn=False, criterion="l2_folded")
    assert plan.removed["2.weight"].get(1)
    found = graphprune.recover(net, plan, x[:2], [x[:100], x[100:]]).model
    with torch.no_grad():
        wanted, cut, got = net(x), plan.apply(net)(x), found(x)
    assert (got - wanted).norm() < 0.6 * (cut - wanted).norm()
    assert (found[3].weight is None) != affine


def test_norms_with_hooks_are_left_in_place() -> None:
    """Their inputs cannot be folded away unseen; the layer before them is fitted as it is."""
    torch.manual_seed(3)
    x = torch.randn(200, 3, 6, 6)
    net = trained(Net(6, 1, False, 1), x)
    seen: list[int] = []
    net.nb[0].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator, index]
    plan = graphprune.plan(net, x[:2], 0.4, fold_bn=False)
    found = graphprune.recover(net, plan, x[:2], [x[:100], x[100:]]).model
    with torch.no_grad():
        wanted, cut, got = net(x), plan.apply(net)(x), found(x)
    assert (got - wanted).norm() < (cut - wanted).norm()


def test_a_bias_that_the_fit_adds_is_there_and_frozen_like_its_layer() -> None:
    torch.manual_seed(4)
    x = torch.randn(200, 3, 6, 6)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip
    trained(net, x).requires_grad_(False)
    plan = graphprune.plan(net, x[:2], 0.5, ignore=["3"], fold_bn=False)
    assert plan.removed["3.weight"].get(1)
    found = graphprune.recover(net, plan, x[:2], [x[:100], x[100:], x[:2]]).model  # the last batch is held
    assert bool(found[3].bias.any()) and not any(p.requires_grad for p in found.parameters())  # type: ignore[index, union-attr]
    with torch.no_grad():
        wanted, got = (net(x).mean(0), found(x).mean(0))
        results = [m[:4](x).mean((0, 2, 3)) for m in (net, found)]  # type: ignore[index]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)  # what a constant term is for
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3)
