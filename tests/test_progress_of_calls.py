"""Every public function with `progress=`: a function is told what goes on, can end the call, and everything is then as
it was."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.deployment import exporting
from graphprune.runtimes.latency import meters, networks
from tests.deployment.local import LocalWorker

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
LABELLED = [(x, torch.arange(8) % 4) for x in BATCHES]
BUDGET = graphprune.Budget(macs=0.6)


class Block(nn.Module):
    """A layer that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.first(x)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
    return nn.Sequential(stem, nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def _plan(net: nn.Module) -> graphprune.Plan:
    return graphprune.plan(net, X, 0.5, progress=False)


def _exported(net: nn.Module, **more: Any) -> graphprune.Artifact:
    with tempfile.TemporaryDirectory() as folder:
        return graphprune.export(net, X, Path(folder) / "a.onnx", rounds=2, **more)


def _trained(net: nn.Module, _: int) -> nn.Module:
    return graphprune.finetune(net, LABELLED, epochs=1).model


# What is called, and some of what is told, from the outermost stage inwards.
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[str, ...]]]] = {
    "plan": (
        lambda net, **more: graphprune.plan(net, X, 0.5, criterion="reconstruction", data=BATCHES, **more),
        [("planning", "tracing"), ("planning", "choosing widths", "ranking", "data"),
         ("planning", "choosing widths", "ranking", "eliminating")],
    ),
    "plan within a budget": (
        lambda net, **more: graphprune.plan(net, X, budget=BUDGET, criterion="reconstruction", data=BATCHES, **more),
        [("planning", "choosing widths", "ranking", "measuring"),
         ("planning", "choosing widths", "ranking", "measuring", "eliminating")],
    ),
    "plan in steps of layers": (
        lambda net, **more: graphprune.plan(
            net, X, budget=BUDGET, granularity=["layer", "channels"], data=BATCHES, **more
        ),
        [("planning", "ranking layers", "data"), ("planning", "trying numbers of layers", "repairing", "fitting")],
    ),
    "plan of layers": (
        lambda net, **more: graphprune.plan(
            net, X, 0.5, granularity="layer", criterion="loss", data=LABELLED,
            loss_fn=nn.functional.cross_entropy, **more,
        ),
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
    "synthesize": (
        lambda net, **more: graphprune.synthesize(net, X, 8, steps=3, batch_size=4, **more),
        [("making inputs", "batches"), ("making inputs", "batches", "matching batch norms")],
    ),
    "latency_table": (
        lambda net, **more: graphprune.latency_table(net, X, **more),
        [("latency table", "the whole network", "timing"), ("latency table", "computations", "timing")],
    ),
    "advise": (
        lambda net, **more: graphprune.advise(net, X, "resources", data=BATCHES[:1], **more),
        [("advice", "trying methods", "channels, 0.5", "repairing", "fitting"),
         ("advice", "trying methods", "masks, 0.9")],
    ),
    "sparsity.reconstruct": (
        lambda net, **more: graphprune.sparsity.reconstruct(net, network(), X, BATCHES, **more),
        [("reconstruction", "fitting", "data")],
    ),
    "report": (
        lambda net, **more: graphprune.report(net, network(), X, evaluate=LABELLED, **more),
        [("report", "scoring, before", "data"), ("report", "counting"), ("report", "writing sparse files")],
    ),
    "benchmark": (
        lambda net, **more: graphprune.benchmark({"one": net}, X, rounds=2, min_time=0.0, **more),
        [("benchmark", "exporting"), ("benchmark", "timing batches of 1")],
    ),
    "export": (
        _exported,
        [("export", "writing for ONNX Runtime"), ("export", "timing")],
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
            net, X, 0.5, steps=2, train=_trained, **more
        ),
        [("pruning in steps", "steps", "pruning", "choosing widths", "ranking"),
         ("pruning in steps", "steps", "training", "fine-tuning", "training")],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that is measured in no time, and nothing known of another one."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(networks, "make_chain_meter", lambda *_: lambda _, widths: [1e-6 * width for width in widths])
    monkeypatch.setattr(meters, "_ROUNDS", 1)
    monkeypatch.setattr(networks, "_ROUNDS", 2)
    monkeypatch.setattr(exporting, "Worker", LocalWorker)


def prepared(name: str) -> nn.Module:
    net = network()
    return graphprune.sparsity.magnitude(net, 0.5) if name == "sparsity.reconstruct" else net


@pytest.mark.parametrize("name", CALLS)
def test_a_function_is_told_and_may_end_the_call(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call, wanted = CALLS[name]
    found: list[graphprune.Progress] = []
    call(prepared(name), progress=found.append)
    told = {p.stages for p in found}
    assert set(wanted) <= told, sorted(told)
    assert all(p.total is None or 0 <= p.done <= p.total for p in found)

    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "another"))
    net, error, left = prepared(name), KeyError("enough"), iter(range(len(found) // 2, -1, -1))
    before = held(net)

    def stop(_: graphprune.Progress) -> None:
        if not next(left):
            raise error

    with pytest.raises(KeyError) as raised:
        call(net, progress=stop)
    assert raised.value is error
    assert_as_before(net, before)


Held = dict[str, tuple[torch.Tensor, bool]]


def held(net: nn.Module) -> tuple[Held, list[tuple[bool, int]]]:
    """Tensors, which of them want gradients, modes and hooks."""
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    flags = [(m.training, len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in net.modules()]
    return {name: (t.detach().clone(), t.requires_grad) for name, t in named.items()}, flags


def assert_as_before(net: nn.Module, before: tuple[Held, list[tuple[bool, int]]]) -> None:
    now = held(net)
    assert now[1] == before[1] and now[0].keys() == before[0].keys()
    for name, (tensor, wants) in before[0].items():
        assert torch.equal(now[0][name][0], tensor) and now[0][name][1] == wants


def test_all_that_take_it_are_here_and_say_so() -> None:
    functions = {name: getattr(graphprune, name) for name in graphprune.__all__}
    functions |= {f"sparsity.{name}": getattr(graphprune.sparsity, name) for name in graphprune.sparsity.__all__}
    takers = {n for n, f in functions.items() if inspect.isroutine(f) and "progress" in inspect.signature(f).parameters}
    assert takers == {name.partition(" ")[0] for name in CALLS}
    for name in takers:
        assert inspect.signature(functions[name]).parameters["progress"].default is None, name
        assert "`progress`" in functions[name].__doc__ or "progress: " in functions[name].__doc__, name


@pytest.mark.parametrize("name", CALLS)
def test_other_things_are_refused_before_any_work(name: str) -> None:
    with pytest.raises(graphprune.GraphPruneError, match=r"^progress: expected None, True, False or a function"):
        CALLS[name][0](prepared(name), progress="yes")
