"""`doctor`: costs computed by hand for nets whose every blocker is known, and slowly for random ones."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import GraphPruneError
from graphprune.workflows.diagnosis.doctor import examine
from tests.cli.command_line import as_json, failed, ok, wrong, zoo_folder
from tests.networks import random_network
from tests.workflows.diagnosis.reference import costs


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from zoo_folder(tmp_path, monkeypatch)


def line_of(function: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if text in line)


class Literal(nn.Module):
    """A width written down: conv (3 -> 8), view to 8 x 4, head over 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)
        self.spare = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu())
        return self.head(x.view(-1, 8, 4).mean(2))


def test_costs_of_each_blocker() -> None:
    found = graphprune.doctor(Literal(), torch.randn(2, 3, 2, 2))
    stem, conv, head, spare = 3 * 6 + 6, 6 * 8 * 9 + 8, 8 * 5 + 5, 7 * 2 + 2
    assert found.model == "Literal" and found.ratio == 0.5
    assert found.parameters == stem + conv + head + spare
    assert found.macs == 2 * (4 * 18 + 4 * 6 * 8 * 9 + 40)
    assert [(p.name, p.kind, p.units, p.axes, p.parameters, p.macs) for p in found.prunable] == [
        ("stem.weight[0]", "channel", 6, ("stem.weight[0]", "stem.bias[0]", "conv.weight[1]"),
         stem + conv - 8, 2 * (4 * 18 + 4 * 6 * 8 * 9)),
    ]  # fmt: skip
    assert found.prunable_parameters == stem + conv - 8
    assert found.prunable_macs == 2 * (4 * 18 + 4 * 6 * 8 * 9)
    literal, given, output, unused = sorted(found.blockers, key=lambda b: -b.macs)
    assert literal.kind == "literal" and literal.reason == "size 1 in view() is the literal 8"
    assert literal.axes == {"conv.weight[0]": 8, "conv.bias[0]": 8, "head.weight[1]": 8}
    assert (literal.parameters, literal.macs) == (conv + 40, 2 * (4 * 6 * 8 * 9 + 40))
    line = line_of(Literal.forward, "x.view")
    assert literal.source == f"test_doctor.py:{line} in forward"
    assert literal.code == "return self.head(x.view(-1, 8, 4).mean(2))"
    assert output.kind == "output" and output.source == literal.source and output.modules == ("head",)
    assert output.axes == {"head.weight[0]": 5, "head.bias[0]": 5}
    assert (output.parameters, output.macs) == (45, 2 * 40)
    assert given.reason == "reads the model's input" and given.modules == ("stem",)
    assert given.axes == {"stem.weight[1]": 3} and (given.parameters, given.macs) == (18, 2 * 4 * 18)
    assert unused.kind == "unused" and unused.modules == ("spare",) and unused.macs == 0
    assert unused.axes == {"spare.weight[0]": 2, "spare.weight[1]": 7, "spare.bias[0]": 2}
    assert unused.parameters == 16


def test_sorted_by_parameters_or_macs() -> None:
    by_parameters = graphprune.doctor(Literal(), torch.randn(2, 3, 2, 2)).blockers
    by_macs = graphprune.doctor(Literal(), torch.randn(2, 3, 2, 2), sort="macs").blockers
    assert [b.parameters for b in by_parameters] == [480, 45, 18, 16]
    assert [b.macs for b in by_macs] == [3536, 144, 80, 0]


class Heads(nn.Module):
    """`width // heads` with `width` held by the residual: heads can only go together with features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.q, self.out = 2, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, width = x.shape
        q = self.q(x).view(n, self.heads, width // self.heads)
        return x + self.out((q * q.sum(0, keepdim=True)).reshape(n, width))


def test_sizes_that_contradict_are_found_by_planning() -> None:
    found = graphprune.doctor(Heads(), torch.randn(3, 8))
    assert found.prunable == () and found.prunable_parameters == 0
    sizes = [b for b in found.blockers if b.kind == "size"]
    assert sizes and {b.source for b in sizes} <= {
        f"test_doctor.py:{line_of(Heads.forward, text)} in forward" for text in ("self.q(x)", "self.out(")
    }
    for blocker in sizes:  # all of q (rows and bias), and the columns of out
        assert blocker.parameters == 64 + 8 + 64 and blocker.macs == 3 * 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.linalg.svdvals(self.inner(x).unsqueeze(-1))
        return x + self.outer(hidden.expand(-1, 4).relu())


def test_equal_reasons_are_merged_and_operators_named() -> None:
    model = nn.Sequential(Block(), Block())
    found = graphprune.doctor(model, torch.randn(3, 6))
    (blocker,) = [b for b in found.blockers if b.kind == "operator"]
    assert "linalg_svd" in blocker.reason
    assert blocker.source == f"test_doctor.py:{line_of(Block.forward, 'svdvals')} in forward"
    assert blocker.modules == ("0", "1")
    assert blocker.axes == {"0.inner.weight[0]": 4, "0.inner.bias[0]": 4, "1.inner.weight[0]": 4, "1.inner.bias[0]": 4}
    assert blocker.parameters == 2 * 28


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.position, self.head = nn.Embedding(11, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens) + self.position)


def test_positions_and_vocabulary_are_no_channels() -> None:
    found = graphprune.doctor(Tokens(), torch.zeros(2, 5, dtype=torch.long))
    assert [(p.name, p.units, p.parameters) for p in found.prunable] == [("table.weight[1]", 6, 66 + 30 + 66)]
    assert set(found.others) == {"table.weight[0]", "position[0]"}
    assert [b.kind for b in found.blockers] == ["output"]
    assert "2 parameter axes are no channels: table.weight[0], position[0]" in str(found)


def test_fused_projections_are_held_by_what_holds_heads_and_features() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 3 * 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    found = graphprune.doctor(Fused(), torch.randn(2, 5, 6))
    assert not any(b.kind == "selected" for b in found.blockers)
    output = next(b for b in found.blockers if b.kind == "output")
    assert output.axes == {"qkv.weight[0]": 24} and output.parameters == 24 * 6
    assert output.macs == found.macs == 2 * 5 * 6 * 24 + 2 * 2 * 5 * 5 * (4 + 4)


@pytest.mark.parametrize("seed", range(12))
def test_costs_on_random_networks(seed: int) -> None:
    model, example = random_network(seed)
    found = graphprune.doctor(model, example)
    graph = graphprune.trace(model, example)
    again = examine(model, graph, 0.0, "parameters")  # without what planning adds
    movable, held = costs(model, graph)
    for blocker in again.blockers:
        if blocker.kind not in ("unused",):
            assert blocker.parameters == held[blocker.kind, blocker.reason, blocker.source], blocker
    assert again.prunable_parameters == movable >= found.prunable_parameters
    counted = graphprune.count(model, example)
    assert (found.parameters, found.macs) == (counted.parameters, counted.macs)
    assert found.prunable_macs <= found.macs and all(b.macs <= found.macs for b in found.blockers)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.LSTM(5, 7, 2, bidirectional=True, proj_size=3), torch.randn(4, 2, 5)),
        (nn.Bilinear(3, 4, 5), (torch.randn(6, 3), torch.randn(6, 4))),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), torch.randn(1, 4, 5, 5)),
        (nn.MultiheadAttention(8, 2, kdim=3, vdim=5), (torch.randn(4, 8), torch.randn(6, 3), torch.randn(6, 5))),
    ],
)
def test_all_work_is_accounted_for(model: nn.Module, example: Any) -> None:
    assert graphprune.doctor(model, example).macs == graphprune.count(model, example).macs > 0


def test_nothing_of_the_model_changes() -> None:
    model = Literal().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    example = torch.randn(1, 3, 2, 2)
    mode = torch.get_rng_state()
    graphprune.doctor(model, example)
    assert model.training and torch.equal(torch.get_rng_state(), mode)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, example = Literal(), torch.randn(2, 3, 2, 2)
    found = graphprune.doctor(model, example)
    assert found.to_dict() == graphprune.doctor(Literal(), torch.randn(2, 3, 2, 2)).to_dict()


def test_bad_arguments() -> None:
    with pytest.raises(GraphPruneError, match="sort: expected 'parameters' or 'macs', got 'cost'"):
        graphprune.doctor(Literal(), torch.randn(1, 3, 2, 2), sort="cost")
    with pytest.raises(GraphPruneError, match="ratio"):
        graphprune.doctor(Literal(), torch.randn(1, 3, 2, 2), ratio=1.5)
    with pytest.raises(GraphPruneError, match="tracing: the model raised"):
        graphprune.doctor(Literal(), torch.randn(1, 4, 2, 2))


def test_text_and_json(zoo: None) -> None:
    text = ok("doctor", "zoo:net")
    assert "Can be pruned" in text and "Cannot be removed" in text
    assert "part of the model's output" in text and "zoo.py:18 in forward: return self.head(" in text
    data = as_json("doctor", "zoo:net", "--sort", "macs")
    assert data["model"] == "zoo:net" and data["class"] == "Net"
    assert [(p["name"], p["units"]) for p in data["prunable"]] == [("first.weight[0]", 8), ("second.weight[0]", 6)]
    reads, output = data["blockers"]
    assert reads["axes"] == {"first.weight[1]": 3} and reads["macs"] == 2 * 36 * 8 * 27 and reads["parameters"] == 216
    assert output["axes"] == {"head.weight[0]": 4, "head.bias[0]": 4} and output["parameters"] == 28
    assert json.loads(json.dumps(data)) == data
    assert "(the first 1 of 2)" in ok("doctor", "zoo:net", "--limit", "1")


def test_errors_on_the_command_line(zoo: None) -> None:
    assert "sort: expected" in failed("doctor", "zoo:net", "--sort", "cost")
    assert "tracing" in failed("doctor", "zoo:net", "--input-shape", "1,5,8,8")
    assert "--limit" in wrong("doctor", "zoo:net", "--limit", "-1")


class Autoencoder(nn.Module):
    """Two halves that are called on their own; a part that is not, and a method that runs all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.to_latent = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)
        self.from_latent, self.leave = nn.Conv2d(4, 16, 1), nn.ConvTranspose2d(16, 3, 2, 2)

    def _embed(self, x: Tensor) -> Tensor:
        return self.enter(x).relu()  # type: ignore[no-any-return]

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_latent(self._embed(x)).chunk(2, 1)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        return self.leave(self.from_latent(z).relu())  # type: ignore[no-any-return]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])

    def describe(self) -> str:
        return str(self.enter)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encode(x)
        return self.decode(mean + spread.exp())


def test_parts_that_are_called_on_their_own() -> None:
    model, x = Autoencoder().eval(), torch.randn(2, 3, 16, 16)
    found = graphprune.doctor(model, x)
    assert [(i.method, i.modules, i.layers) for i in found.interfaces] == [
        ("encode", ("enter", "to_latent"), ("to_latent",)),
        ("decode", ("from_latent", "leave"), ("to_latent",)),
    ]
    assert "ignore=['to_latent']" in str(found)
    assert found.to_dict()["interfaces"][0]["layers"] == ["to_latent"]
    small = graphprune.prune(model, x, 0.5, ignore=found.interfaces[0].layers)
    assert small.decode(torch.randn(2, 4, 8, 8)).shape == (2, 3, 16, 16) and small.enter.out_channels == 8
    held = graphprune.doctor(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.randn(2, 3))
    assert not held.interfaces
