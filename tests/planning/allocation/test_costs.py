"""What operators cost: counts, budgets, `doctor` and the exported file say the same of one network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import graphprune
from graphprune import Budget
from graphprune.planning.allocation import mac_costs, parameter_costs
from graphprune.plans.verification.rewrite import gone_components
from graphprune.tracing.work import terms_of
from tests.networks import NETWORKS, random_network
from tests.tracing.counting_reference import computed


class Sequences(nn.Module):
    """A recurrent layer between two linear ones, on whole sequences or on packed ones."""

    def __init__(self, kind: Any, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.packed = packed
        self.i, self.r = nn.Linear(8, 32), kind(32, 32, batch_first=True, **options)
        self.o = nn.Linear((options.get("proj_size") or 32) * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.i(x))
        if not self.packed:
            return self.o(self.r(y)[0])
        packed = pack_padded_sequence(y, torch.tensor([9, 7, 4]), batch_first=True)
        return self.o(pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])


class Reader(nn.Module):
    """Convolutions, then two layers of LSTM in both directions, as text recognition does."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, (4, 1)))
        self.r, self.o = nn.LSTM(32, 48, num_layers=2, bidirectional=True), nn.Linear(96, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(torch.relu(self.c(x)).squeeze(2).permute(2, 0, 1))[0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.m, self.o = nn.Linear(8, 32), nn.Linear(8, 24), nn.Bilinear(32, 24, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.m(self.a(x).relu(), self.b(x).relu()).relu())


class Experts(nn.Module):
    """Tokens sorted by expert, multiplied with the experts' matrices in one call each."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.router, self.o = nn.Linear(8, 32), nn.Linear(32, 6), nn.Linear(32, 8)
        self.up = nn.Parameter(torch.randn(6, 32, 48) * 0.1)
        self.down = nn.Parameter(torch.randn(6, 48, 32) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x.flatten(0, 1))
        weights, chosen = torch.topk(self.router(h).softmax(-1), 2)
        order = chosen.flatten().argsort()
        ends = torch.bincount(chosen.flatten(), minlength=6).cumsum(0).to(torch.int32)
        y = torch._grouped_mm(h.repeat_interleave(2, 0)[order], self.up, offs=ends).relu()
        y = torch._grouped_mm(y, self.down, offs=ends)[order.argsort()].view(len(h), 2, -1)
        return self.o(h + (y * weights[..., None]).sum(1))


SEQUENCES, IMAGES = torch.randn(3, 9, 8), torch.randn(2, 1, 8, 24)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "lstm": (lambda: Sequences(nn.LSTM), SEQUENCES),
    "lstm both": (lambda: Sequences(nn.LSTM, bidirectional=True), SEQUENCES),
    "lstm layers": (lambda: Sequences(nn.LSTM, num_layers=3), SEQUENCES),
    "lstm projected": (lambda: Sequences(nn.LSTM, num_layers=2, bidirectional=True, proj_size=16), SEQUENCES),
    "lstm packed": (lambda: Sequences(nn.LSTM, packed=True, num_layers=2, bidirectional=True), SEQUENCES),
    "gru": (lambda: Sequences(nn.GRU), SEQUENCES),
    "gru packed": (lambda: Sequences(nn.GRU, packed=True), SEQUENCES),
    "gru layers both": (lambda: Sequences(nn.GRU, num_layers=2, bidirectional=True), SEQUENCES),
    "rnn": (lambda: Sequences(nn.RNN), SEQUENCES),
    "rnn both": (lambda: Sequences(nn.RNN, bidirectional=True), SEQUENCES),
    "reader": (Reader, IMAGES),
    "bilinear": (Pair, SEQUENCES),
    "experts": (Experts, SEQUENCES),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETS[name][0]().eval(), NETS[name][1]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in ("macs", "params") for n in NETS if n != "experts"])
def test_budgets_are_met(kind: str, name: str) -> None:
    model, x = made(name)
    plan = graphprune.plan(model, x, budget=Budget(**{kind: 0.5}))
    small, dense = graphprune.count(plan.apply(model), x), graphprune.count(model, x)
    used = small.macs / dense.macs if kind == "macs" else small.parameters / dense.parameters
    assert 0.99 * 0.5 <= used <= 0.5


def test_a_mixture_meets_budgets_that_its_widths_allow() -> None:
    model, x = made("experts")  # grouped products take widths in steps of 16 bytes only: 4 of 32
    for share in (0.875, 0.5, 0.25):
        small = graphprune.prune(model, x, budget=Budget(macs=share))
        assert graphprune.count(small, x).macs == share * graphprune.count(model, x).macs


@pytest.mark.parametrize("name", NETS)
def test_all_say_the_same(name: str) -> None:
    model, x = made(name)
    graph, dense = graphprune.trace(model, x), graphprune.count(model, x)
    plan = graphprune.plan(model, x, budget=Budget(macs=0.5), strict=True)
    small, gone = graphprune.count(plan.apply(model), x), gone_components(graph, plan)
    costs = mac_costs(graph)
    assert costs.full == costs.value(np.ones(len(graph.groups))) == dense.macs == graphprune.doctor(model, x).macs
    assert costs.exact(gone) == small.macs
    assert parameter_costs(graph, model, plan.folds).exact(gone) == small.parameters


@pytest.mark.parametrize("name", NETS)
def test_nothing_that_doctor_calls_held_goes(name: str) -> None:
    """At most what `doctor` calls prunable goes, and about all of it where a ratio takes nearly everything."""
    model, x = made(name)
    found, dense = graphprune.doctor(model, x), graphprune.count(model, x)
    least = graphprune.count(graphprune.plan(model, x, 0.95, round_to=1).apply(model), x)
    assert dense.macs - least.macs <= found.prunable_macs
    assert dense.macs - least.macs >= 0.8 * found.prunable_macs


def exported_macs(path: Path, feed: dict[str, Any]) -> int:
    """MACs of an ONNX file by the shapes that ONNX Runtime finds when it runs it."""
    model = onnx.load(path)
    known = {v.name for v in (*model.graph.input, *model.graph.output)}
    names = dict.fromkeys(n for node in model.graph.node for n in node.output if n and n not in known)
    outputs = [v.name for v in model.graph.output]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {name: tuple(value.shape) for name, value in feed.items()}
    shapes |= {t.name: tuple(t.dims) for t in model.graph.initializer}
    results = session.run([*outputs, *names], feed)
    shapes |= {n: np.shape(r) for n, r in zip([*outputs, *names], results, strict=True)}
    total = 0
    for node in model.graph.node:
        a, b = ([shapes[n] for n in node.input[:2]] + [()])[:2] if node.input else ((), ())
        out = shapes[node.output[0]] if node.output[0] else ()
        attributes = {t.name: onnx.helper.get_attribute_value(t) for t in node.attribute}
        if node.op_type == "MatMul":
            total += math.prod(out) * a[-1]
        elif node.op_type == "Gemm":
            total += math.prod(out) * a[0 if attributes.get("transA") else 1]
        elif node.op_type == "Conv":
            total += math.prod(out) * math.prod(b[1:])
        elif node.op_type in ("LSTM", "GRU"):
            steps, batch, _ = a
            recurrent = shapes[node.input[2]]  # W and R: (directions, gates * hidden, inputs) and (..., hidden)
            total += steps * batch * (math.prod(b) + math.prod(recurrent))
        else:
            assert node.op_type not in ("Einsum", "RNN", "ConvTranspose")
    return total


@pytest.mark.parametrize("name", ["lstm both", "gru", "rnn", "reader"])
def test_the_exported_file_computes_as_much(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    for network in (model, graphprune.prune(model, x, budget=Budget(macs=0.5))):
        path = tmp_path / "net.onnx"
        graphprune.export_onnx(network, x, path)
        feed = {onnx.load(path).graph.input[0].name: x.numpy()}
        assert exported_macs(path, feed) == graphprune.count(network, x).macs


def test_grouped_products_are_counted_as_they_run() -> None:
    model, x = made("experts")
    for network in (model, graphprune.prune(model, x, budget=Budget(macs=0.5))):
        assert computed(network, x) == graphprune.count(network, x).macs


def exactly(model: nn.Module, x: Any, **options: Any) -> None:
    """The costs of a plan are what is counted in the network that it makes."""
    graph, dense = graphprune.trace(model, x), graphprune.count(model, x)
    plan = graphprune.plan(model, x, fold_bn=False, **options)
    small, gone, costs = graphprune.count(plan.apply(model), x), gone_components(graph, plan), mac_costs(graph)
    assert costs.value(np.ones(len(graph.groups))) == costs.full == dense.macs == graphprune.doctor(model, x).macs
    assert costs.exact(gone) == small.macs
    assert parameter_costs(graph, model, ()).exact(gone) == small.parameters


# One network for each operator with terms that stands in networks, and some of the random ones.
def representatives() -> list[str]:
    seen: set[str] = set()
    chosen = []
    for name, network in NETWORKS.items():
        model, x = network()
        nodes = graphprune.trace(model, x).trace.graph.nodes
        used = {str(node.target) for node in nodes if terms_of(node)}
        if used - seen:
            chosen.append(name)
            seen |= used
    return chosen


def test_networks_of_every_operator_cost_what_is_counted() -> None:
    names = representatives()
    assert len(names) > 12
    for name in names:
        exactly(*NETWORKS[name](), ratio=0.5, ignore=NETWORKS[name].ignore)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_random_networks_cost_what_is_counted(seed: int) -> None:
    exactly(*random_network(seed), ratio=0.4, criterion="random", round_to=1)


class Chain(nn.Module):
    """Layers of drawn kinds, one after the other, on sequences of a drawn width."""

    def __init__(self, kinds: list[str], widths: list[int]) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(
            self._layer(kind, a, b) for kind, (a, b) in zip(kinds, itertools.pairwise(widths), strict=True)
        )
        self.last = nn.Linear(widths[-1], 3)

    @staticmethod
    def _layer(kind: str, a: int, b: int) -> nn.Module:
        both = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        return {
            "linear": lambda: nn.Linear(a, b),
            "conv": lambda: nn.Conv1d(a, b, 3, padding=1),
            "groups": lambda: nn.Conv1d(a, b, 3, padding=1, groups=2),
            "transposed": lambda: nn.ConvTranspose1d(a, b, 3, padding=1),
            "lstm": lambda: nn.LSTM(a, b, batch_first=True),
            "projected": lambda: nn.LSTM(a, b + 2, proj_size=b // 2, **both),
            "gru": lambda: nn.GRU(a, b // 2, **both),
            "rnn": lambda: nn.RNN(a, b, batch_first=True),
            "bilinear": lambda: nn.Bilinear(a, a, b),
            "attention": lambda: nn.ModuleList([nn.Linear(a, 3 * b), nn.Linear(b, b)]),
            "products": lambda: nn.ModuleList([nn.Linear(a, b), nn.Linear(a, b), nn.Linear(a, b)]),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = torch.relu(self._step(kind, layer, x))
        return self.last(x)

    def _step(self, kind: str, layer: Any, x: Tensor) -> Tensor:
        if kind in ("conv", "groups", "transposed"):
            return layer(x.transpose(1, 2)).transpose(1, 2)
        if kind in ("lstm", "projected", "gru", "rnn"):
            return layer(x)[0]
        if kind == "bilinear":
            return layer(x, x)
        if kind == "attention":
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in layer[0](x).chunk(3, -1))
            return layer[1](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if kind == "products":
            q, k, v = (part(x) for part in layer)
            return torch.baddbmm(v, (q @ k.mT).softmax(-1), v)
        return layer(x)


KINDS = "linear conv groups transposed lstm projected gru rnn bilinear attention products".split()


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    widths=st.lists(st.sampled_from([4, 6, 8, 10]), min_size=5, max_size=5),
    ratio=st.sampled_from([0.3, 0.5, 0.7]),
)
@settings(max_examples=30)
def test_random_chains_cost_what_is_counted(kinds: list[str], widths: list[int], ratio: float) -> None:
    exactly(Chain(kinds, widths[: len(kinds) + 1]).eval(), torch.randn(2, 5, widths[0]), ratio=ratio, round_to=1)


class Auxiliary(nn.Module):
    """A second head that runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 400)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).relu()
        return (self.b(y), self.extra(y)) if self.training else self.b(y)


def test_what_only_training_computes_costs_nothing() -> None:
    model, x = Auxiliary().eval(), torch.randn(2, 8)
    exactly(model, x, ratio=0.5)
    small = graphprune.prune(model, x, budget=Budget(macs=0.5))
    assert 0.9 * 0.5 <= graphprune.count(small, x).macs / graphprune.count(model, x).macs <= 0.5
