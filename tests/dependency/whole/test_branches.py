from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.dependency.whole.blocks import Block
from graphprune.dependency.whole.branches import find_branches, search_branches
from graphprune.plans.modules.bypass import Silence
from graphprune.plans.surgery import remove_layers
from graphprune.plans.verification import bypassed, verify_layers
from tests.layered_networks import networks

STYLES = ("pre-norm", "scaled", "post-norm", "parallel", "subtracted", "in place", "norm behind")


class Mlp(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))


class Mixer(nn.Module):
    """Mixes tokens; returns a tuple, and takes its stream by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.tokens = nn.Linear(width, width), nn.Linear(5, 5)

    def forward(self, *, stream: Tensor) -> tuple[Tensor, None]:
        return self.tokens(self.linear(stream).mT).mT, None


class Layer(nn.Module):
    def __init__(self, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.mixer, self.mlp = Mixer(width), Mlp(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, without: frozenset[str] = frozenset()) -> Tensor:
        def mixer(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if "mixer" in without else self.mixer(stream=x)[0]

        def mlp(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if "mlp" in without else self.mlp(x)

        if self.style == "parallel":
            return mixer(self.norm1(x)) + mlp(self.norm2(x)) + x
        if self.style == "post-norm":
            x = self.norm1(mixer(x) + x)
            return self.norm2(x + mlp(x))
        if self.style == "norm behind":  # it goes with its branch: its offset is no zero
            x = x + (torch.zeros_like(x) if "mixer" in without else self.norm1(mixer(x)))
            return (torch.zeros_like(x) if "mlp" in without else self.norm2(mlp(x)) * self.scale) + x
        if self.style == "subtracted":
            x = x - mixer(self.norm1(x))
            return mlp(self.norm2(x)) - x
        if self.style == "in place":
            x = x.add_(mixer(self.norm1(x)))
            return x.add_(mlp(self.norm2(x)))
        factor = self.scale if self.style == "scaled" else 1.0
        x = x + torch.dropout(mixer(self.norm1(x)), 0.1, self.training) * factor
        return x + factor * mlp(self.norm2(x)).clone()


class Network(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(Layer(6, style) for _ in range(2))
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor, without: frozenset[str] = frozenset()) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, frozenset(n.rpartition(".")[2] for n in without if n.startswith(f"layers.{i}.")))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("style", STYLES)
def test_every_subset_of_branches_adds_nothing(style: str) -> None:
    torch.manual_seed(0)
    model, x = Network(style).eval(), torch.randn(2, 5, 3)
    branches = find_branches(model, x)
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("mixer", "mlp")]
    assert sorted(b.module for b in branches) == names
    for k in range(1, 5):
        for chosen in itertools.combinations(branches, k):
            small = remove_layers(model, chosen)
            torch.testing.assert_close(small(x), model(x, frozenset(b.module for b in chosen)))
            assert verify_layers(model, small, chosen, x).passed
            assert not any(list(small.get_submodule(path).parameters()) for b in chosen for path in b.modules)
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert type(small) is Network and all(type(layer) is Layer for layer in small.layers)
    assert isinstance(small.layers[0].mlp, Silence)


class Gathered(nn.Module):
    """What BERT's layers end in: a projection, the sum and a norm in one module."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(inner, width), nn.Dropout(0.1), nn.LayerNorm(width)

    def forward(self, hidden: Tensor, x: Tensor, silent: bool) -> Tensor:
        made = torch.zeros_like(x) if silent else self.dropout(self.dense(hidden))
        return self.norm(made + x)


class Spread(nn.Module):
    """A network whose branches are several modules that outer ones call. `kinds`, one for each layer:

    - "bert": a mixer and a projection that is in the module which adds and normalises;
    - "gated": two layers of an MLP side by side and one behind, called from here;
    - "bottleneck": convolution-like layers with batch norms behind each, narrower inside, and a ReLU after the sum;
    - "norms": RMS norms before and behind, a scale for each channel.
    """

    def __init__(self, kinds: Sequence[str], inner: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in kinds)
        for kind, layer in zip(kinds, self.layers, strict=True):
            if kind == "bert":
                layer.update({"mixer": Mixer(6), "output": Gathered(6, 6)})
            elif kind == "gated":
                layer.update({"gate": nn.Linear(6, inner), "up": nn.Linear(6, inner), "down": nn.Linear(inner, 6)})
            elif kind == "bottleneck":
                layer.update({"a": nn.Linear(6, inner), "norm_a": nn.BatchNorm1d(5)})
                layer.update({"b": nn.Linear(inner, 6), "norm_b": nn.BatchNorm1d(5)})
            else:
                layer.update({"before": nn.RMSNorm(6), "mlp": Mlp(6), "behind": nn.RMSNorm(6)})
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if "norm" in name and tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 2.0)

    def forward(self, x: Tensor, without: frozenset[int] = frozenset()) -> Tensor:
        for i, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            gone = i in without
            if kind == "bert":
                x = layer["output"](x if gone else layer["mixer"](stream=x)[0], x, gone)
            elif kind == "gated":
                x = x if gone else x + layer["down"](torch.sigmoid(layer["gate"](x)) * layer["up"](x))
            elif kind == "bottleneck":
                made = 0.0 if gone else layer["norm_b"](layer["b"](torch.relu(layer["norm_a"](layer["a"](x)))))
                x = torch.relu(x + made)
            else:
                x = x if gone else x + 0.5 * layer["behind"](layer["mlp"](layer["before"](x)))
        return x


MODULES = {
    "bert": ["mixer", "output.dense"],
    "gated": ["gate", "up", "down"],
    "bottleneck": ["a", "norm_a", "b", "norm_b"],
    "norms": ["mlp", "behind"],
}


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(sorted(MODULES)), min_size=1, max_size=4),
    inner=st.sampled_from([3, 6, 9]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_branches_of_several_modules_add_nothing(kinds: list[str], inner: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    model, x = Spread(kinds, inner).eval(), torch.randn(2, 5, 6)
    branches, reasons = search_branches(model, x)
    assert [list(b.modules) for b in branches] == [
        [f"layers.{i}.{name}" for name in MODULES[kind]] for i, kind in enumerate(kinds)
    ]
    assert not reasons and all(Block.from_dict(dataclasses.asdict(b)) == b for b in branches)
    gone = sorted(data.draw(st.sets(st.integers(0, len(kinds) - 1))))
    chosen = [branches[i] for i in gone]
    small = remove_layers(model, chosen)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x, frozenset(gone)), rtol=1e-6, atol=1e-6)
    assert verify_layers(model, small, chosen, x).passed
    silent = {path for b in chosen for path in b.modules}
    assert {n for n, m in small.named_modules() if isinstance(m, Silence)} == silent
    left = sum(p.numel() for n, p in model.named_parameters() if not any(n.startswith(f"{s}.") for s in silent))
    assert sum(p.numel() for p in small.parameters()) == left


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_and_its_fused_path(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    branches = find_branches(model, x)
    pair = [("self_attn",), ("linear1", "linear2")]
    assert [b.modules for b in branches] == [tuple(f"layers.{i}.{n}" for n in names) for i in (0, 1) for names in pair]
    for k in range(1, 5):
        for chosen in itertools.combinations(branches, k):
            small = remove_layers(model, chosen)
            assert verify_layers(model, small, chosen, x).passed
            with torch.no_grad(), bypassed(model, chosen):
                wanted = model(x, src_key_padding_mask=padding)
            with torch.no_grad():
                got = small(x, src_key_padding_mask=padding)
            torch.testing.assert_close(got[~padding], wanted[~padding], rtol=1e-5, atol=1e-5)


class Added(nn.Module):
    """Adds to its branch in place, and works in place inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.b(torch.relu_(self.norm(self.a(x))))
        made += x
        return torch.relu_(made)


def test_zeros_may_be_written_into() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Added(), Added()).eval(), torch.randn(2, 3, 4, 4)
    branches = find_branches(model, x)
    assert [b.modules for b in branches] == [tuple(f"{i}.{n}" for n in ("a", "norm", "b")) for i in (0, 1)]
    small = remove_layers(model, branches[:1])
    assert verify_layers(model, small, branches[:1], x).passed
    torch.testing.assert_close(small(x), model[1](torch.relu(x)))


class Other(nn.Module):
    """What is no branch: each result is more than an addend, or zero would not pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.part, self.after = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        if self.how == "activated":
            return x + torch.exp(y)
        if self.how == "normed here":
            return x + torch.nn.functional.layer_norm(y, (4,), bias=self.after.bias)
        if self.how == "attention here":
            return x + self.after((y @ y.mT).softmax(-1) @ x)
        if self.how == "read inside":
            return x + self.after(y) + y.abs().sum()
        if self.how == "read twice":
            return x + y + y.abs().sum()
        if self.how == "product":
            return x * y
        if self.how == "after a sum":
            return (y + 1.0).mul(2.0) + x
        if self.how == "divisor":
            return x + x / y
        if self.how == "another stream":
            return y + torch.ones_like(x)
        return y


REASONS = {
    "activated": "a branch of 0 cannot be left out: it ends in exp,",
    "read twice": "0.part or what it reads is called more than once, is read elsewhere too,",
    "read inside": "0.after or what it reads is called more than once, is read elsewhere too,",
    "normed here": "it ends in native_layer_norm, which is no module of its own",
    "attention here": "a branch of 0 cannot be left out: it computes m",
    "after a sum": "it ends in add,",
    "divisor": "it ends in div,",
    "product": "",
    "another stream": "",
    "alone": "",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_is_no_branch(how: str) -> None:
    """Inline attention too: its last projection alone would leave the rest to be computed for nothing."""
    model, x = nn.Sequential(Other(how)).eval(), torch.randn(3, 4)
    found, reasons = search_branches(model, x)
    assert not found and len(reasons) == bool(REASONS[how])
    assert all(REASONS[how] in reason for reason in reasons)
    if reasons:
        assert set(reasons) <= set(graphprune.plan(model, x, 0.5, granularity="branch").frozen)


def test_layers_of_an_mlp_that_the_layer_calls_itself() -> None:
    model, x, _ = networks()["decoder"]
    found = [b.modules for b in find_branches(model, x)]
    assert found[::2] == [(f"layers.{i}.attention",) for i in range(4)]
    assert found[1::2] == [(f"layers.{i}.up", f"layers.{i}.down") for i in range(4)]
    with pytest.raises(GraphPruneError, match=r"torch\.nn\.Module"):
        find_branches("model", x)  # type: ignore[arg-type]
