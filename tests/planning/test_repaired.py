"""What `prune` repairs by default, what it remembers of it, and what is then verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.plans.history import history_of, repair_after
from graphprune.support.walking import named_tensors


class Net(nn.Module):
    """Batch norms before a convolution, a layer without bias, and one behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def made() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        net.train()(torch.randn(64, 3, 9, 9))  # statistics of data
    return net.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = named_tensors(a), named_tensors(b)
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("fold_bn", [True, False])
def test_by_default_from_what_is_there(fold_bn: bool) -> None:
    net, data = made(), [X, torch.randn(6, 3, 9, 9)]
    plan = graphprune.plan(net, X, 0.5, fold_bn=fold_bn)
    small = graphprune.prune(net, X, 0.5, fold_bn=fold_bn)
    assert same(small, graphprune.recover(net, plan, X).model) and repair_after(small, plan) == "moments"
    fitted = graphprune.prune(net, X, 0.5, fold_bn=fold_bn, data=data)
    assert same(fitted, graphprune.recover(net, plan, X, data, "least_squares", new_bias=False).model)
    assert repair_after(fitted, plan) == "least_squares"
    bare = graphprune.prune(net, X, 0.5, fold_bn=fold_bn, recover=None)
    assert same(bare, plan.apply(net)) and repair_after(bare, plan) == ""
    assert not same(bare, small) and not same(bare, fitted) and not same(small, fitted)


def test_where_nothing_is_stored_the_network_is_as_it_was_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(5, 4)
    plan = graphprune.plan(net, x, 0.5)
    small = graphprune.prune(net, x, 0.5)
    assert same(small, plan.apply(net)) and repair_after(small, plan) == ""
    told = graphprune.recover(net, plan, x)
    assert repair_after(told.model, plan) == "" and not any(layer.changed for layer in told.layers)


def test_nothing_to_repair_and_nothing_known_are_no_errors() -> None:
    net = made()
    kept = graphprune.prune(net, X, 0.5, ignore="*")
    assert repair_after(kept, graphprune.plan(net, X, 0.5, ignore="*")) == ""
    with torch.device("meta"):
        empty = Net().eval()
    assert graphprune.prune(empty, torch.empty(2, 3, 9, 9, device="meta"), 0.5).head.in_features == 8

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.norm(self.up(x)).relu()
            return out

    blocks = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(6, 2)).eval()
    x = torch.randn(8, 6)
    plan = graphprune.plan(blocks, x, 0.5, granularity="layer")
    assert plan.layers and same(graphprune.prune(blocks, x, 0.5, granularity="layer"), plan.apply(blocks))
    data = [torch.randn(64, 6)]
    layered = graphprune.prune(blocks, x, 0.5, granularity="layer", data=data)
    assert repair_after(layered, graphprune.plan(blocks, x, 0.5, granularity="layer", data=data)) == "least_squares"


def tampered(change: Callable[[nn.Module], None]) -> tuple[Any, Any, nn.Module]:
    net = made()
    plan = graphprune.plan(net, X, 0.5)
    small = graphprune.prune(net, X, 0.5, recover="mean")
    with torch.no_grad():
        change(small)
    return net, plan, small


def test_verification_says_what_it_compares() -> None:
    net, plan, small = tampered(lambda model: None)
    report = graphprune.verify(net, small, plan, X)
    assert report.passed, str(report)
    names = [check.name for check in report.checks]
    assert names[:2] == ["forward, repaired", "repaired"] and {"permutation", "zero equivalence"} <= set(names)
    assert "recover='mean'" in str(report) and "what the plan makes" in str(report)
    bare = graphprune.verify(net, plan.apply(net), plan, X)
    assert [check.name for check in bare.checks] == [*names[2:], "state"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: model.body[3].weight[0, 0].add_(1), "body.3.weight: has other values"),
        (lambda model: setattr(model, "head", nn.Linear(8, 5)), "head.weight: has other values"),
        (lambda model: setattr(model, "head", nn.Linear(8, 6)), "head.weight: has shape (6, 8) instead of (5, 8)"),
        (lambda model: model.register_buffer("more", torch.zeros(2)), "more: a tensor where none should be"),
    ],
)
def test_verification_catches_what_no_repair_does(change: Callable[[Any], None], told: str) -> None:
    net, plan, small = tampered(change)
    report = graphprune.verify(net, small, plan, X)
    assert not report.passed and told in str(report)


def test_a_repair_with_data_may_change_any_value_but_no_shape() -> None:
    net, data = made(), [X]
    plan = graphprune.plan(net, X, 0.5)
    small = graphprune.prune(net, X, 0.5, data=data)
    assert graphprune.verify(net, small, plan, X).passed
    small.head = nn.Linear(8, 6)
    assert not graphprune.verify(net, small, plan, X).passed


def test_files_remember_repairs_and_later_prunings_find_the_biases_they_gave(tmp_path: Path) -> None:
    net = made()
    once = graphprune.prune(net, X, 0.5)
    assert once.head.bias is not None
    plan = graphprune.plan(once, X, 0.5)
    twice = graphprune.prune(once, X, 0.5, recover=None)
    for model, repairs in ((once, ("moments",)), (twice, ("moments", ""))):
        found = graphprune.load(graphprune.save(model, tmp_path / "small.safetensors"), made)
        history = history_of(found)
        assert history is not None and history.repairs == repairs and same(found, model)
    assert graphprune.verify(once, twice, plan, X).passed
    loaded = graphprune.load(graphprune.save(once, tmp_path / "once.safetensors"), made)
    assert graphprune.verify(net, loaded, graphprune.plan(net, X, 0.5), X).passed


def test_unknown_methods_are_errors() -> None:
    net = made()
    for wrong in ("means", "", True):
        with pytest.raises(GraphPruneError, match="recover: expected one of 'auto', 'mean'"):
            graphprune.prune(net, X, 0.5, recover=wrong)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="expected a method, got None"):
        graphprune.recover(net, graphprune.plan(net, X, 0.5), X, method=None)  # type: ignore[arg-type]
