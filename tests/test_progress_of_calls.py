"""Every public function with `progress=`: a function is told what goes on, can end the call, and everything is then as
it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.runtimes.latency import chains, meters

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
LABELLED = [(x, torch.arange(8) % 4) for x in BATCHES]
BUDGET = graphprune.Budget(macs=0.6)


class Net(nn.Module):
    """Two convolutions and a head, the first part repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x + self.norm(self.second(x)).relu()
        return self.head(x.mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _reconstruct(net: nn.Module, **options: Any) -> Any:
    dense = graphprune.load_dense(net) if False else network()
    return graphprune.sparsity.reconstruct(net, dense, X, BATCHES, **options)


def _plan(net: nn.Module) -> graphprune.Plan:
    return graphprune.plan(net, X, 0.5, progress=False)


# What is called, and some of what is told, from the outermost stage inwards.
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[str, ...]]]] = {
    "plan": (
        lambda net, **more: graphprune.plan(net, X, 0.5, criterion="reconstruction", data=BATCHES, **more),
        [("planning", "tracing"), ("planning", "choosing widths", "ranking", "data")],
    ),
    "plan in steps of layers": (
        lambda net, **more: graphprune.plan(
            net, X, budget=BUDGET, granularity=["layer", "channels"], data=BATCHES, **more
        ),
        [("planning", "ranking layers", "data"), ("planning", "trying numbers of layers", "repairing", "fitting")],
    ),
    "plan of layers": (
        lambda net, **more: graphprune.plan(net, X, 0.5, granularity="layer", criterion="loss", data=LABELLED,
                                            loss_fn=nn.functional.cross_entropy, **more),
        [("planning", "ranking layers", "layers left out", "data"), ("planning", "trying")],
    ),
    "prune": (
        lambda net, **more: graphprune.prune(net, X, 0.5, data=BATCHES, **more),
        [("pruning", "planning", "choosing widths", "ranking"), ("pruning", "cutting"), ("pruning", "verifying"),
         ("pruning", "repairing", "fitting", "data")],
    ),
    "recover": (
        lambda net, **more: graphprune.recover(net, _plan(net), X, BATCHES, **more),
        [("repairing", "data"), ("repairing", "fitting", "data")],
    ),
    "latency_table": (
        lambda net, **more: graphprune.latency_table(net, X, **more),
        [("latency table", "the whole network", "timing"), ("latency table", "computations", "timing")],
    ),
    "advise": (
        lambda net, **more: graphprune.advise(net, X, "resources", data=BATCHES[:1], **more),
        [("advice", "trying methods", "channels, 0.5", "repairing", "fitting"), ("advice", "trying methods",
                                                                               "masks, 0.9")],
    ),
    "reconstruct": (_reconstruct, [("reconstruction", "fitting", "data")]),
    "report": (
        lambda net, **more: graphprune.report(net, network(), X, evaluate=LABELLED, speed={"rounds": 2}, **more),
        [("report", "scoring, before", "data"), ("report", "benchmark", "timing batches of 1")],
    ),
    "benchmark": (
        lambda net, **more: graphprune.benchmark({"one": net}, X, rounds=2, min_time=0.0, **more),
        [("benchmark", "exporting"), ("benchmark", "timing batches of 1")],
    ),
    "sensitivity": (
        lambda net, **more: graphprune.sensitivity(net, X, BATCHES, ratios=[0.5], **more),
        [("sensitivity", "curves")],
    ),
    "finetune": (
        lambda net, **more: graphprune.finetune(net, LABELLED, epochs=1, evaluate=LABELLED, **more),
        [("fine-tuning", "data"), ("fine-tuning", "training")],
    ),
    "pipeline": (
        lambda net, **more: graphprune.pipeline(net, X, LABELLED, finetune_epochs=1, train_epochs=1, **more),
        [("pipeline", "training"), ("pipeline", "pruning and fine-tuning"), ("pipeline", "report")],
    ),
    "prune_gradually": (
        lambda net, **more: graphprune.prune_gradually(
            net, X, 0.5, steps=2, train=lambda small, _: graphprune.finetune(small, LABELLED, epochs=1).model, **more
        ),
        [("pruning in steps", "steps", "pruning", "ranking"), ("pruning in steps", "steps", "training",
                                                               "fine-tuning", "training")],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine whose times are known at once, and no cache of another one."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    yield


def prepared(name: str) -> Net:
    net = network()
    if name == "reconstruct":
        graphprune.sparsity.magnitude(net, 0.5)
    return net


@pytest.mark.parametrize("name", CALLS)
def test_a_function_is_told(name: str) -> None:
    call, wanted = CALLS[name]
    found: list[graphprune.Progress] = []
    call(prepared(name), progress=found.append)
    told = {p.stages for p in found}
    assert set(wanted) <= told, sorted(told)
    assert all(p.total is None or 0 <= p.done <= p.total for p in found)
