"""Every point of a curve is what pruning that group alone does, measured by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphprune
from graphprune import GraphPruneError


class Net(nn.Module):
    """A residual block, a batch norm to fold, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = x + self.c(self.b(x).relu())
        return self.head(x.mean((2, 3)))


RATIOS = (0.25, 0.5)


def made() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    return net, torch.randn(10, 3, 5, 5), torch.randint(0, 4, (10,))


def pruned_alone(net: nn.Module, x: Tensor, name: str, count: int, size: int, criterion: str, data: Any) -> nn.Module:
    ratio = {name.split(".")[0]: count / size}
    return graphprune.plan(net, x[:2], ratio, criterion=criterion, data=data, round_to=1).apply(net)


@pytest.mark.parametrize("criterion", ["l2", "reconstruction"])
@torch.no_grad()
def test_errors_are_those_of_pruning_each_group_alone(criterion: str) -> None:
    net, x, _ = made()
    data = [x[:6], x[6:]]
    found = graphprune.sensitivity(net, x[:2], data, ratios=RATIOS, criterion=criterion)
    assert {c.size for c in found.curves} == {8, 6} and len(found.curves) == 2
    want = net(x)
    for curve in found.curves:
        for count, error in zip(curve.removed, curve.errors, strict=True):
            got = pruned_alone(net, x, curve.name, count, curve.size, criterion, data)(x)
            assert error == pytest.approx(float((got - want).square().sum() / want.square().sum()), rel=1e-4)


@torch.no_grad()
def test_with_a_loss_the_error_is_its_rise_weighted_by_samples() -> None:
    net, x, y = made()
    data = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = graphprune.sensitivity(net, x[:2], data, loss_fn=cross_entropy, ratios=RATIOS)
    dense = float(cross_entropy(net(x), y))
    for curve in found.curves:
        assert curve.removed == tuple(round(r * curve.size) for r in RATIOS)
        for count, error in zip(curve.removed, curve.errors, strict=True):
            small = pruned_alone(net, x, curve.name, count, curve.size, "flow", None)
            assert error == pytest.approx(float(cross_entropy(small(x), y)) - dense, abs=1e-5)


def test_a_cache_saves_the_work_and_is_of_one_question_only(tmp_path: Path) -> None:
    net, x, _ = made()
    path, seen = tmp_path / "curves.json", []

    def measured(now: graphprune.Progress) -> None:
        if now.stage == "curves" and now.note not in ("", *seen):
            seen.append(now.note)

    first = graphprune.sensitivity(net, x, ratios=RATIOS, cache=path, progress=measured)
    assert len(seen) == 2
    assert graphprune.Sensitivity.load(path) == first
    # interrupted after the first group: the second alone is measured
    cut = graphprune.Sensitivity(first.measure, first.order, first.source, first.curves[:1])
    cut.save(path)
    seen.clear()
    again = graphprune.sensitivity(net, x, ratios=RATIOS, cache=path, progress=measured)
    assert again == first and seen == [first.curves[1].name]
    for change in ({"ratios": (0.5,)}, {"criterion": "l1"}, {"data": [x + 1]}):
        with pytest.raises(GraphPruneError, match=r"cache: .* holds curves of other"):
            graphprune.sensitivity(net, x, **{"ratios": RATIOS, "cache": path, **change})
    with torch.no_grad():
        net.head.bias += 1
    with pytest.raises(GraphPruneError, match=r"cache: .* holds curves of other"):
        graphprune.sensitivity(net, x, ratios=RATIOS, cache=path)
    assert graphprune.Sensitivity.load(path) == first


def test_ignored_groups_have_no_curve_and_the_model_stays_as_it_was() -> None:
    net, x, _ = made()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = graphprune.sensitivity(net.train(), x, ratios=[0.5], ignore="b")
    assert [c.size for c in found.curves] == [8] and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_budget_is_spent_where_the_curves_are_flat() -> None:
    net, x, _ = made()
    with torch.no_grad():
        net.c.weight[:, 3:] *= 1e-4  # half of b's channels hardly count
    curves = graphprune.sensitivity(net, x, [x], ratios=(0.25, 0.5, 0.75), criterion="wanda")
    plan = graphprune.plan(net, x[:1], budget=graphprune.Budget(macs=0.6), criterion=curves.criterion, data=[x])
    kept = {g.size: g.kept for g in plan.groups}
    assert kept[6] <= 3 and kept[8] >= 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": []}, "ratios: expected at least one"),
        ({"ratios": [1.0]}, r"ratios: expected a number in \[0, 1\)"),
        ({"ratios": 0.5}, "ratios: expected a list"),
        ({"criterion": "wanda"}, "needs data: pass data="),
        ({"loss_fn": cross_entropy}, "batch 0 has no targets"),
        ({"data": [(torch.zeros(2, 3, 5, 5), 1)], "loss_fn": cross_entropy}, "loss_fn failed on batch 0: TypeError"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    net, x, _ = made()
    with pytest.raises(GraphPruneError, match=message):
        graphprune.sensitivity(net, x, **arguments)
