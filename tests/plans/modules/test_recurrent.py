"""Recurrent networks of free widths: equal to torch's where both exist, and to pruned ones with zeros put back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import graphprune
from graphprune import GraphPruneError
from graphprune.plans.modules.recurrent import Recurrent, replacement_of
from tests.oracles import parameters_match_plan, permute_check, relative_error, zero_reference

KINDS = ["LSTM", "GRU", "RNN", "ReLU"]


def network(kind: str, width: int, hidden: int, layers: int, **options: Any) -> nn.RNNBase:
    if kind == "ReLU":
        return nn.RNN(width, hidden, layers, nonlinearity="relu", **options)
    made: nn.RNNBase = getattr(nn, kind)(width, hidden, layers, **options)
    return made


configurations = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "layers": st.integers(1, 3),
        "bidirectional": st.booleans(),
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "projected": st.booleans(),
    }
)


def build(chosen: dict[str, Any], width: int = 4, hidden: int = 6) -> nn.RNNBase:
    options = {k: chosen[k] for k in ("bidirectional", "batch_first", "bias")}
    if chosen["projected"] and chosen["kind"] == "LSTM":
        options["proj_size"] = 3
    return network(chosen["kind"], width, hidden, chosen["layers"], **options)


def assert_same(got: Any, want: Any) -> None:
    if isinstance(want, PackedSequence):
        assert isinstance(got, PackedSequence)
        got, want = got.data, want.data
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        torch.testing.assert_close(got, want)


@settings(max_examples=25)
@given(configurations, st.sampled_from(["batch", "alone", "packed", "unsorted"]), st.booleans(), st.integers(0, 99))
def test_equal_to_torch(chosen: dict[str, Any], form: str, states: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = build(chosen)
    ours = Recurrent(module)
    x: Any = torch.randn(3, 5, 4)
    if form == "alone":
        x = x[0]
    elif form != "batch":
        lengths = torch.tensor([5, 3, 2] if form == "packed" else [2, 5, 3])
        first = torch.randn(3, 5, 4)
        x = pack_padded_sequence(first, lengths, batch_first=True, enforce_sorted=form == "packed")
    hx: Any = None
    if states:
        count = module.num_layers * (2 if module.bidirectional else 1)
        batch = () if form == "alone" else ((5 if form == "batch" and not module.batch_first else 3),)
        hx = torch.randn(count, *batch, module.proj_size or 6)
        if chosen["kind"] == "LSTM":
            hx = hx, torch.randn(count, *batch, 6)
    assert_same(ours(x, hx), module(x, hx))


def test_takes_over_parameters_hooks_and_mode() -> None:
    module = nn.LSTM(4, 6, 2, dropout=0.5)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    ours = Recurrent(module)
    assert all(p is module.get_parameter(n) for n, p in ours.named_parameters())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in module.named_parameters()] and ours.training
    x = torch.randn(5, 3, 4)
    torch.manual_seed(3)
    ours(x)
    assert seen == ["hook"]
    torch.manual_seed(3)
    first = ours(x)[0]
    assert not torch.equal(first, ours(x)[0])  # dropout between the layers
    ours.eval(), ours.flatten_parameters()
    assert_same(ours(x), module.eval()(x)) and not torch.equal(ours(x)[0], first)
    assert "widths=(6, 6)" in repr(ours)


def test_only_what_needs_it_is_replaced() -> None:
    class Own(nn.LSTM):
        pass

    assert replacement_of(nn.GRU(3, 5, 3)) is None and replacement_of(nn.Linear(2, 3)) is None
    uneven = nn.GRU(3, 5, 2)
    uneven.weight_ih_l1 = nn.Parameter(torch.randn(12, 5))
    uneven.weight_hh_l1 = nn.Parameter(torch.randn(12, 4))
    found = replacement_of(uneven)
    assert found is not None and found.widths == (5, 4) and not found.stacked
    own = Own(3, 5, 2)
    own.weight_hh_l1 = nn.Parameter(torch.randn(16, 4))
    assert replacement_of(own) is None


def test_states_of_uneven_layers() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 5, 2, batch_first=True)
    for name, shape in {"weight_ih_l1": (16, 5), "weight_hh_l1": (16, 4), "bias_ih_l1": 16, "bias_hh_l1": 16}.items():
        setattr(module, name, nn.Parameter(torch.randn(shape)))
    ours = Recurrent(module)
    x = torch.randn(2, 6, 3)
    whole, (h, c) = ours(x)
    assert [tuple(t.shape) for t in (*h, *c)] == [(1, 2, 5), (1, 2, 4), (1, 2, 5), (1, 2, 4)]
    begun, states = ours(x[:, :4])
    rest, ends = ours(x[:, 4:], states)
    torch.testing.assert_close(torch.cat([begun, rest], 1), whole)
    assert_same(ends, (h, c))
    with pytest.raises(GraphPruneError, match="initial states: expected 2, one per layer, got 1"):
        ours(x, (h[:1], c[:1]))


# -- pruned


class Reader(nn.Module):
    """A recurrent network between two layers; `read`: what of its results is used."""

    def __init__(self, chosen: dict[str, Any], read: str, hidden: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.net = build(chosen, 4, hidden)
        self.read, self.first = read, chosen["batch_first"]
        directions = 2 if chosen["bidirectional"] else 1
        projected = self.net.proj_size or hidden
        self.head = nn.Linear({"state": projected, "memory": hidden}.get(read, directions * projected), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.read == "packed":
            lengths = torch.arange(x.shape[1], x.shape[1] - x.shape[0], -1)
            out, _ = self.net(pack_padded_sequence(x, lengths, batch_first=True))
            return self.head(pad_packed_sequence(out, batch_first=True)[0])
        out, states = self.net(x)
        if self.read == "state":
            return self.head((states[0] if isinstance(states, tuple) else states)[-1])
        if self.read == "memory":
            return self.head(states[1][-1])
        return self.head(out)


@settings(max_examples=25)
@given(configurations, st.sampled_from(["sequence", "state", "memory", "packed"]), st.integers(0, 99))
def test_pruned_and_proven(chosen: dict[str, Any], read: str, seed: int) -> None:
    torch.manual_seed(seed)
    if read == "memory" and chosen["kind"] != "LSTM":
        read = "state"
    model, example = Reader(chosen, read).eval(), torch.randn(2, 7, 5)
    graph = graphprune.trace(model, example)
    ratios = {"embed": 0.5, **{f"net.weight_ih_l{k}": 0.2 + 0.2 * k for k in range(chosen["layers"])}}
    if read in ("state", "memory"):  # all layers are one group, named by the first
        ratios = {"embed": 0.5, "net.weight_ih_l0": 0.34}
    plan = graphprune.plan(model, example, ratios, round_to=1)
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, example, graph=graph)
    assert report.passed, report
    doubled = copy.deepcopy(small).double()
    reference = zero_reference(model, plan.removed)
    for x in (example, torch.randn(2, 9, 5)) if read != "packed" else (example,):
        assert relative_error(doubled(x.double()), reference(x.double())) < 1e-9
    widths = [small.net.get_parameter(f"weight_hh_l{k}").shape[0] for k in range(chosen["layers"])]
    gates = {"LSTM": 4, "GRU": 3}.get(chosen["kind"], 1)
    if read in ("state", "memory"):
        assert widths == [4 * gates] * chosen["layers"] and isinstance(small.net, nn.RNNBase)
    else:
        kept = [round(6 * (1 - 0.2 - 0.2 * k) + 1e-9) for k in range(chosen["layers"])]
        if small.net.proj_size:  # a projection is narrower than what it projects
            kept = [max(k, small.net.proj_size + 1) for k in kept]
        assert widths == [k * gates for k in kept]
        assert isinstance(small.net, Recurrent) == (len(set(kept)) > 1)
    for group in graph.groups:
        change = permute_check(model, group.members, example, np.random.default_rng(seed))
        assert change is None or change < 1e-9, group.name
    small.train()(example).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("given", ["parameters", "inputs", "encoder"])
def test_initial_states(given: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.GRU(4, 6, 2), nn.Linear(6, 3)
            self.start, self.encoder = nn.Parameter(torch.randn(2, 1, 6)), nn.GRU(4, 6, 2)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            if given == "parameters":
                state = self.start.expand(-1, x.shape[1], -1).contiguous()
            elif given == "encoder":
                state = self.encoder(x.flip(0))[1]
            return self.head(self.net(x, state)[0])

    model, example = Net().eval(), (torch.randn(5, 2, 4), torch.randn(2, 2, 6))
    if given == "inputs":
        text = graphprune.trace(model, example).explain("net.weight_hh_l1")
        assert "frozen: reads the model's input" in text
        assert graphprune.plan(model, example).empty
        return
    plan = graphprune.plan(model, example, 0.5)
    small = plan.apply(model)
    assert not parameters_match_plan(model, small, plan.removed)
    assert graphprune.verify(model, small, plan, example).passed
    assert small.net.hidden_size == 3 and small.net.weight_hh_l1.shape == (9, 3)
    assert small.start.shape == (2, 1, 3 if given == "parameters" else 6)


def test_hidden_size_read_by_the_users_code() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.LSTM(4, 6, 2, bidirectional=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)[0]
            return self.head(out.view(*out.shape[:2], 2, self.net.hidden_size).sum(2))

    model, example = Net().eval(), torch.randn(5, 2, 4)
    small = graphprune.prune(model, example, {"net.weight_ih_l0": 0.17, "net.weight_ih_l1": 0.5}, round_to=1)
    assert small.net.hidden_size == 3 and small.net.widths == (5, 3)
    assert small(torch.randn(7, 3, 4)).shape == (7, 3, 3)


def test_pruned_twice_saved_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    chosen = {"kind": "LSTM", "layers": 3, "bidirectional": True, "batch_first": True, "bias": True, "projected": False}
    model, example = Reader(chosen, "sequence", 12).eval(), torch.randn(2, 7, 5)
    small = graphprune.prune(model, example, {"net.*": 0.5, "net.weight_ih_l0": 0.25}, round_to=1)
    assert isinstance(small.net, Recurrent) and small.net.widths == (9, 6, 6)
    again = graphprune.prune(small, example, 0.5, round_to=1)
    assert again.net.widths == (4, 3, 3)
    copied = copy.deepcopy(again)
    copied.load_state_dict(again.state_dict())
    assert torch.equal(copied(example), again(example))
    graphprune.export_onnx(small, example, tmp_path / "a.onnx")  # compares the two outputs


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.cell, self.head = 6, getattr(nn, kind)(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.shape[1], self.width)
            state: Any = (h, torch.zeros_like(h)) if kind == "LSTMCell" else h
            for step in x:
                state = self.cell(step, state)
            return self.head(state[0] if kind == "LSTMCell" else state)

    model, example = Net().eval(), torch.randn(5, 2, 4)
    small = graphprune.prune(model, example, 0.5)
    assert small.width == small.cell.hidden_size == 3 and small.cell.input_size == 4
    plan = graphprune.plan(model, example, 0.5)
    reference = zero_reference(model, plan.removed)
    torch.set_default_dtype(torch.float64)
    try:
        assert relative_error(copy.deepcopy(small).double()(example.double()), reference(example.double())) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


class OwnLSTM(nn.LSTM):
    """A subclass: nothing of ours can take its place."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        out, states = super().forward(x, hx)
        return 2 * out, states


class Stacked(nn.Module):
    """Two layers whose states nobody reads; `literal` says whether the width is written out."""

    def __init__(self, kind: type[nn.RNNBase], literal: bool) -> None:
        super().__init__()
        self.rnn, self.end, self.literal = kind(5, 8, 2, batch_first=True), nn.Linear(8, 3), literal

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        out = out.reshape(x.shape[0], -1, 8 if self.literal else out.shape[-1])
        return self.end(out.mean(1))


UNEVEN = {f"rnn.weight_{side}_l{layer}": ratio for side in ("ih", "hh") for layer, ratio in ((0, 0.5), (1, 0.25))}


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("output", ["module", "hybrid", "graph"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, OwnLSTM])
def test_uneven_layers_in_every_output_mode(kind: type[nn.RNNBase], output: str, literal: bool) -> None:
    """Layers may differ where ours can take the place of torch's module; a subclass stays, with equal widths."""
    torch.manual_seed(0)
    model, x = Stacked(kind, literal).eval(), torch.randn(2, 6, 5)
    plan = graphprune.plan(model, x, UNEVEN, output=output, round_to=1)
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, x)
    assert report.passed, report
    rnn = small.get_submodule("rnn")
    stays = literal and output == "module"  # the last layer's width is written out
    if kind is OwnLSTM:
        assert isinstance(rnn, OwnLSTM)
        assert rnn.weight_hh_l0.shape[1] == rnn.weight_hh_l1.shape[1] == (8 if stays else 4)
    else:
        assert isinstance(rnn, Recurrent) and rnn.widths == (4, 8 if stays else 6)
    longer = torch.randn(3, 4, 5)
    torch.testing.assert_close(small(longer), zero_reference(model, plan.removed)(longer.double()).float())
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
