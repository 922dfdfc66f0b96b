"""A machine of our own: computations take a time that is known, so that everything built on it can be checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.dependency import trace
from graphprune.dependency.axes import Axes
from graphprune.runtimes.latency.costs import running
from graphprune.runtimes.latency.kernels import Sample
from graphprune.runtimes.latency.meters import Reading
from graphprune.runtimes.latency.rig import Bench, Rig
from graphprune.runtimes.latency.stairs import Stairs
from graphprune.runtimes.latency.table import LatencyTable
from graphprune.runtimes.latency.units import units_of
from graphprune.runtimes.profiles import NodeTime, Profile


def law(sample: Sample, step: int = 1) -> float:
    """Seconds: proportional to the product of the lengths, each filled up to a multiple of `step`, and a floor."""
    lengths = [math.ceil(n / step) * step for n in sample.lengths]
    return 1e-9 * math.prod(lengths) * math.prod(sample.kernel.kernel or (1,)) + 1e-6


def meter(step: int = 1) -> Any:
    def measure(samples: Sequence[Sample]) -> list[Reading]:
        return [(law(s, step), node(s, law(s, step))) for s in samples]

    return measure


def node(sample: Sample, seconds: float) -> NodeTime:
    """What a runtime would show of a sample."""
    return NodeTime("n", "Conv", ((1,), (hash(sample) % 10**9,)), ((1, 1, 1),), seconds)


def chain(step: int) -> Any:
    return lambda kind, widths: [1e-9 * math.ceil(w / step) * step + 1e-7 for w in widths]


def table(step: int = 1) -> LatencyTable:
    """The table of that machine; nothing measured yet."""
    steps = tuple(range(0, 64, step))
    found = {k: Stairs(steps, (1.0,) * 64) for k in ("conv", "pointwise", "depthwise", "linear", "matmul")}
    about = {"provider": "law", "threads": 1}
    return LatencyTable(about, stairs=found, meter=meter(step), chain_meter=chain(step))


def samples_of(model: nn.Module, example: Any) -> list[Sample]:
    """The computations of a network as it is, from a trace of its own."""
    graph = trace(model, example)
    return [u.sample for u in units_of(running(graph), Axes(graph))[0]]


def seconds_of(model: nn.Module, example: Any, step: int = 1, overhead: float = 1.0) -> float:
    """What a whole network takes on that machine."""
    return overhead * sum(law(s, step) for s in samples_of(model, example))


def run_of(model: nn.Module, example: Any, step: int = 1, overhead: float = 1.0) -> Profile:
    """The profile of a run of the dense network."""
    nodes = tuple(node(s, overhead * law(s, step)) for s in samples_of(model, example))
    return Profile(nodes, sum(n.seconds for n in nodes))


class LawBench(Bench):
    """Stands in for exporting and timing; `overhead` is what the table does not know of."""

    def __init__(self, model: nn.Module, example: Any, step: int, growth: float) -> None:
        self.model, self.example, self.step, self.growth = model, example, step, growth

    def close(self) -> None:
        pass

    def profile(self) -> Profile:
        return run_of(self.model, self.example, self.step)

    def compare(self, small: nn.Module) -> tuple[float, float]:
        dense = seconds_of(self.model, self.example, self.step)
        share = seconds_of(small, self.example, self.step) / dense
        return 2 * dense, 2 * dense * share**self.growth  # the machine is busy: all takes twice as long


class LawRig(Rig):
    """That machine; its stairs are found as anywhere."""

    about = {"provider": "law", "threads": 1}

    def __init__(self, step: int = 1, growth: float = 1.0) -> None:
        self.step, self.growth = step, growth

    def meter(self, samples: Sequence[Sample]) -> list[Reading]:
        found: list[Reading] = meter(self.step)(samples)
        return found

    def chain_meter(self, kind: str, widths: Sequence[int]) -> list[float]:
        found: list[float] = chain(self.step)(kind, widths)
        return found

    def bench(self, model: nn.Module, example: Any) -> LawBench:
        return LawBench(model, example, self.step, self.growth)


class Net(nn.Module):
    """All kinds of computations: convolutions (depthwise, grouped, transposed), attention, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.expand, self.depth = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.project = nn.Conv2d(64, 32, 1)
        self.grouped = nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.qkv, self.out = nn.Linear(24, 96), nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x).relu()).relu())
        x = self.up(self.grouped(x).relu()).relu().flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        return self.head(x + self.out(y)).mean(1)  # type: ignore[no-any-return]


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(1, 3, 8, 8)


def planned(monkeypatch: Any, model: nn.Module, example: Any, step: int = 1, growth: float = 1.0, **more: Any) -> Any:
    """A plan on that machine."""
    monkeypatch.setattr("graphprune.planning.within_latency.rig_of", lambda target: LawRig(step, growth))
    monkeypatch.setattr("graphprune.planning.within_latency.own_table", lambda rig: table(step))
    monkeypatch.setattr("graphprune.planning.within_latency.keep", lambda t: None)
    return graphprune.plan(model, example, target=graphprune.Target(provider="cpu"), **more)


def device(monkeypatch: Any, step: int = 1) -> None:
    """Let `graphprune.latency_table` measure that machine; its stairs are found as anywhere."""
    rig = LawRig(step)
    made = LatencyTable(rig.about, meter=rig.meter, chain_meter=rig.chain_meter)
    monkeypatch.setattr("graphprune.runtimes.latency.device.rig_of", lambda target: rig)
    monkeypatch.setattr("graphprune.runtimes.latency.device.own_table", lambda rig: made)
    monkeypatch.setattr("graphprune.runtimes.latency.device.keep", lambda t: None)
