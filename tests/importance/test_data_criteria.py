"""Criteria that look at data, against loops over samples and units; and ten batches against one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.importance import ImportanceContext, resolve_criterion
from graphprune.importance.calibration.gradients import sensitivities
from graphprune.importance.calibration.source import CalibrationSource
from graphprune.plans.surgery import find_folds, folded_tensors
from graphprune.support.walking import named_tensors


class Net(nn.Module):
    """A convolution read by two layers, a residual sum, a flatten and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.n = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, stride=2)
        self.c = nn.Conv2d(4, 6, 1, stride=2)
        self.d = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        x = (self.b(x) + self.c(x[:, :, 1:-1, 1:-1])).relu()
        return self.d(x.flatten(1))


def made() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.n.weight, 0.5, 2)
    nn.init.normal_(net.n.bias)
    net.n.running_mean.normal_()  # type: ignore[union-attr]
    net.n.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net.eval(), torch.randn(20, 2, 6, 6), torch.randint(0, 3, (20,))


def scores(name: str, data: Any) -> list[np.ndarray]:
    net, x, _ = made()
    graph = graphprune.trace(net, x[:2])
    folds = find_folds(net, graph.trace)
    source = CalibrationSource.of(net, x[:2], data, F.cross_entropy)
    assert source is not None
    tensors = {n: t.detach() for n, t in named_tensors(net).items()} | folded_tensors(net, folds)
    context = ImportanceContext(net, tensors, calibration=source.calibration(net, folds))
    criterion = resolve_criterion(name)
    return [criterion(context, group) for group in graph.groups]


def sums(vectors: list[Tensor]) -> np.ndarray:
    return np.mean([v.detach().double().numpy() for v in vectors], axis=0)


class Folded(nn.Module):
    """Net in float64 with the batch norm folded, written out, with a factor on every channel."""

    def __init__(self) -> None:
        super().__init__()
        net = graphprune.fold_conv_bn(made()[0], made()[1][:2]).double()
        self.a, self.b, self.c, self.d = net.a, net.b, net.c, net.d  # type: ignore[assignment]

    def forward(self, x: Tensor, one: Tensor | None = None, two: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(4).double() if one is None else one
        two = torch.ones(6).double() if two is None else two
        first = self.a(x).relu()
        gated = first * one[:, None, None]
        second = (self.b(gated) + self.c(gated[:, :, 1:-1, 1:-1])).relu()
        return self.d((second * two[:, None, None]).flatten(1)), first, second


def weight_reference(square: bool) -> list[np.ndarray]:
    net, (_, x, y) = Folded(), made()
    weights = dict(net.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in weights.items()}
    for i in range(20):
        loss = F.cross_entropy(net(x[i : i + 1].double())[0], y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for n, g in zip(weights, gradients, strict=True):
            total[n] += (g.square() if square else g) / 20
    factor = {n: (p.square() / 2 if square else p) * total[n] for n, p in weights.items()}
    per_filter = {n: factor[f"{n}.weight"].flatten(1).sum(1).abs() for n in "abc"}
    return [sums([per_filter["a"]]), sums([per_filter["b"], per_filter["c"]])]


def gate_reference(final: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
    net, (_, x, y) = Folded(), made()
    rows: list[list[Tensor]] = [[], []]
    for i in range(20):
        gates = [torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (4, 6)]
        loss = F.cross_entropy(net(x[i : i + 1].double(), *gates)[0], y[i : i + 1])
        for row, g in zip(rows, torch.autograd.grad(loss, gates), strict=True):
            row.append(g)
    return [final(torch.stack(row)).mean(0).numpy() for row in rows]


def read(layer: str) -> list[Tensor]:
    """What each layer reads of the first group, or of the second: (samples, channels, positions)."""
    net, (_, x, _) = Folded(), made()
    _, first, second = net(x.double())
    if layer == "first":
        return [first.flatten(2), first[:, :, 1:-1, 1:-1].flatten(2)]
    return [second.flatten(1)[:, :, None]]


def activation_reference(score: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
    """`score` maps all values of one channel, flat, to a number; of a unit of four positions the sum counts."""
    first = sums([torch.stack([score(t[:, c].flatten()) for c in range(4)]) for t in read("first")])
    (flat,) = read("second")
    second = torch.stack([score(flat[:, c].flatten()) for c in range(24)]).reshape(6, 4).sum(1)
    return [first, sums([second])]


def wanda_reference() -> list[np.ndarray]:
    net = Folded()
    parts = []
    for t, w in zip(read("first"), (net.b.weight, net.c.weight), strict=True):
        norm = t.square().sum((0, 2)).sqrt()
        parts.append(torch.stack([w[:, c].abs().sum() for c in range(4)]) * norm)
    (flat,) = read("second")
    second = net.d.weight.abs().sum(0) * flat.square().sum((0, 2)).sqrt()
    return [sums(parts), sums([second.reshape(6, 4).sum(1)])]


def chip_reference() -> list[np.ndarray]:
    def independence(t: Tensor) -> Tensor:
        out = torch.zeros(t.shape[1]).double()
        for sample in t:
            for c in range(len(sample)):
                without = sample.clone()
                without[c] = 0
                out[c] += torch.linalg.matrix_norm(sample, "nuc") - torch.linalg.matrix_norm(without, "nuc")
        return out / len(t)

    (flat,) = read("second")
    return [sums([independence(t) for t in read("first")]), sums([independence(flat).reshape(6, 4).sum(1)])]


def hrank_reference() -> list[np.ndarray]:
    def rank(t: Tensor, side: int) -> Tensor:
        maps = t.reshape(t.shape[0], t.shape[1], side, side)
        return torch.stack([torch.stack([torch.linalg.matrix_rank(m) for m in s]) for s in maps]).double().mean(0)

    one, two = read("first")
    (flat,) = read("second")
    return [sums([rank(one, 6), rank(two, 4)]), sums([(flat != 0).any(2).double().mean(0).reshape(6, 4).sum(1)])]


REFERENCES: dict[str, Callable[[], list[np.ndarray]]] = {
    "taylor": lambda: weight_reference(False),
    "hessian": lambda: weight_reference(True),
    "taylor_gate": lambda: gate_reference(Tensor.abs),
    "fisher": lambda: gate_reference(lambda g: g.square() / 2),
    "activation_mean": lambda: activation_reference(lambda v: v.abs().mean()),
    "activation_variance": lambda: activation_reference(lambda v: v.var(correction=0)),
    "apoz": lambda: activation_reference(lambda v: 1 - (v == 0).double().mean()),
    "wanda": wanda_reference,
    "chip": chip_reference,
    "hrank": hrank_reference,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_against_the_formula(name: str) -> None:
    _, x, y = made()
    got = scores(name, [(x[:8], y[:8]), (x[8:], y[8:])])
    want = REFERENCES[name]()
    assert [len(g) for g in got] == [4, 6]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


# measured as the difference of outputs in float32, which loses digits
RTOL = {"reconstruction": 1e-4}


@pytest.mark.parametrize("name", [*REFERENCES, "reconstruction"])
def test_ten_batches_are_one_batch(name: str) -> None:
    _, x, y = made()
    one, ten = scores(name, [(x, y)]), scores(name, list(zip(x.split(2), y.split(2), strict=True)))
    for a, b in zip(one, ten, strict=True):
        np.testing.assert_allclose(a, b, rtol=RTOL.get(name, 1e-5), atol=1e-9)


def test_the_model_keeps_its_flags_and_gets_no_gradients() -> None:
    net, x, y = made()
    net.train()
    net.a.weight.requires_grad_(False)
    graphprune.plan(net, x[:2], criterion="taylor", data=[(x, y)], loss_fn=F.cross_entropy)
    graphprune.plan(net, x[:2], criterion="fisher", data=[(x, y)], loss_fn=F.cross_entropy)
    assert net.training and not net.a.weight.requires_grad and net.b.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "criterion 'taylor' needs data: pass data=.*targets"),
        ({"data": "inputs"}, "yields no targets, and the model returns no loss of its own"),
        ({"data": "inputs", "loss_fn": F.cross_entropy}, "data: batch 0 has no targets"),
        ({"data": "pairs", "loss_fn": lambda o, t: o}, "loss_fn returned a tensor of shape"),
        ({"data": "pairs", "loss_fn": lambda o, t: 3.0}, "loss_fn returned float"),
        ({"data": "pairs", "loss_fn": lambda o, t: o.missing}, "loss_fn failed on batch 0: AttributeError"),
        ({"data": "pairs", "loss_fn": lambda o, t: t.double().mean()}, "does not depend"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    net, x, y = made()
    forms = {"pairs": [(x, y)], "inputs": [x]}
    options = options | ({"data": forms[options["data"]]} if "data" in options else {})
    with pytest.raises(GraphPruneError, match=message):
        graphprune.plan(net, x[:2], criterion="taylor", **options)


def test_sensitivities_are_squared_jacobians_for_the_drawn_signs() -> None:
    net, (_, x, _) = Folded(), made()
    plain = made()[0]
    source = CalibrationSource.of(plain, x[:2], [x[:8], x[8:]], None)
    assert source is not None
    got = sensitivities(source.calibration(plain, find_folds(plain, graphprune.trace(plain, x[:2]).trace)))
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([torch.randint(0, 2, (n, 3), generator=generator) * 2 - 1 for n in (8, 12)]).double()
    want = torch.zeros(6).double()
    for i in range(20):
        first = net.a(x[i : i + 1].double()).relu()
        made_by_b = net.b(first).detach().requires_grad_()
        out = net.d((made_by_b + net.c(first[:, :, 1:-1, 1:-1])).relu().flatten(1))
        (gradient,) = torch.autograd.grad((out * signs[i]).sum(), made_by_b)
        want += gradient.square().sum((0, 2, 3)) / 20
    torch.testing.assert_close(got["b.weight"], want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["d.weight"], torch.ones(3).double())
