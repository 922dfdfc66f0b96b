"""Counts against a second count that shares no code with ours, and against formulas worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune import GraphPruneError


class Calls(nn.Module):
    """A network whose forward is a function; `parts` are its modules, `scale` its own parameter."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts, self.scale = function, nn.ModuleList(parts), nn.Parameter(torch.ones(1))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.parts, *inputs)


def independent_macs(model: nn.Module, *inputs: Any) -> int:
    """torch's own counter: half its FLOPs. It knows no fused kernels, so attention runs as two products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops: int = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def check_sums(found: graphprune.Count, model: nn.Module) -> None:
    assert sum(layer.macs for layer in found.per_layer.values()) == found.macs
    assert sum(layer.parameters for layer in found.per_layer.values()) == found.parameters
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert set(found.per_layer) <= {name for name, _ in model.named_modules()}


NETWORKS: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, (1, 5), groups=4, dilation=(1, 2), padding="same", bias=False),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        (torch.randn(2, 4, 17, 13),),
    ),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
            nn.ConvTranspose2d(6, 9, (2, 4), groups=3, padding=1),
        ),
        (torch.randn(3, 4, 5, 6),),
    ),
    "one and three axes": (
        Calls(lambda m, x: (m[0](x), m[1](x[..., None, None])), nn.Conv1d(4, 6, 3), nn.Conv3d(4, 2, (3, 1, 1))),
        (torch.randn(2, 4, 9),),
    ),
    "unbatched": (nn.Conv2d(3, 4, 3), (torch.randn(3, 8, 8),)),
    "functional": (
        Calls(lambda m, x: F.linear(F.conv1d(x, x[:2, :, :3]).mean(-1), x[0, 0, :2].expand(7, 2))),
        (torch.randn(4, 3, 9),),
    ),
    "matrix products": (
        Calls(
            lambda m, x, y: (
                x @ y.mT,
                torch.matmul(x[:, :1], other=y[0, 0].T),
                torch.mm(y[0, 0], x[0, 0].T),
                torch.bmm(x[0], mat2=y[0].mT),
                torch.baddbmm(x[0, :, :, :1], x[0], y[0].mT),
                torch.addmm(x[0, 0, :, :1], x[0, 0], y[0, 0].T),
                torch.einsum("abij,abkj->abik", x, y),
                torch.einsum("abij,acij->bc", x, x),
                torch.tensordot(x, y, dims=([3], [3])),
                torch.linalg.multi_dot([x[0, 0], y[0, 0].T, y[0, 0]]),
            )
        ),
        (torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)),
    ),
    "attention": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        (torch.randn(2, 5, 8),),
    ),
    "attention with weights": (
        Calls(lambda m, x, y: m[0](x, y, y), nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)),
        (torch.randn(2, 5, 8), torch.randn(2, 3, 6)),
    ),
    "cells": (
        Calls(lambda m, x: (m[0](x), m[1](x), m[2](x)), nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4)),
        (torch.randn(5, 3),),
    ),
    "shared and repeated": (
        Calls(lambda m, x: m[0](m[0](x)) + F.linear(x, m[0].weight) + m[1](x), nn.Linear(4, 4), nn.Linear(4, 4)),
        (torch.randn(3, 4),),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks_against_an_independent_count(name: str) -> None:
    model, inputs = NETWORKS[name]
    found = graphprune.count(model, inputs)
    assert found.macs == independent_macs(model, *inputs) > 0
    assert found.batch_size == inputs[0].shape[0] and not found.uncounted
    check_sums(found, model)


TORCHVISION = {"resnet18": 64, "mobilenet_v2": 64, "shufflenet_v2_x0_5": 64, "swin_t": 64, "vit_b_16": 224}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_on_the_meta_device(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        image = torch.empty(2, 3, TORCHVISION[name], TORCHVISION[name])
    found = graphprune.count(model, image)
    assert found.macs == independent_macs(model, image)
    check_sums(found, model)


def test_published_numbers() -> None:
    torchvision = pytest.importorskip("torchvision")
    published = {
        "resnet18": (11_689_512, 1.814e9),
        "resnet50": (25_557_032, 4.089e9),
        "mobilenet_v2": (3_504_872, 0.301e9),
        "vit_b_16": (86_567_656, 17.56e9),
    }
    for name, (parameters, macs) in published.items():
        with torch.device("meta"):
            model, image = getattr(torchvision.models, name)(), torch.empty(1, 3, 224, 224)
        found = graphprune.count(model, image)
        assert found.parameters == parameters
        assert found.macs == pytest.approx(macs, rel=2e-3)


def test_real_and_meta_agree_and_layers_agree_with_the_independent_count() -> None:
    torchvision = pytest.importorskip("torchvision")
    model, image = torchvision.models.resnet18().eval(), torch.randn(1, 3, 33, 47)
    found = graphprune.count(model, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    by_module = counter.get_flop_counts()
    for path, layer in found.per_layer.items():
        flops = by_module.get(f"ResNet.{path}")
        assert layer.macs == (sum(flops.values()) // 2 if flops else 0), path
    meta = graphprune.count(model.to("meta"), image.to("meta"))
    assert meta == found


@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d]),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    inner=st.integers(1, 3),
    outer=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    size=st.integers(5, 9),
)
@settings(max_examples=60, deadline=None)
def test_convolutions_of_random_shapes(
    kind: Any, batch: int, groups: int, inner: int, outer: int, kernel: int, stride: int, padding: int, size: int
) -> None:
    conv = kind(groups * inner, groups * outer, kernel, stride=stride, padding=padding, groups=groups).to("meta")
    x = torch.empty(batch, groups * inner, *[size + i for i in range(conv.weight.dim() - 2)], device="meta")
    result = conv(x)
    sites = x[:, 0].numel() if conv.transposed else result[:, 0].numel()
    macs = graphprune.count(conv, x).macs
    assert macs == sites * groups * inner * outer * kernel ** (conv.weight.dim() - 2)
    if result.numel():
        assert macs == independent_macs(conv, x)


@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    ones=st.lists(st.booleans(), min_size=6, max_size=6),
    short=st.integers(0, 3),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    vectors=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=100, deadline=None)
def test_matmul_of_random_shapes(
    lead: list[int], ones: list[bool], short: int, sizes: tuple[int, int, int], vectors: tuple[bool, bool]
) -> None:
    rows, inner, columns = sizes
    left = [*(1 if one else n for n, one in zip(lead, ones, strict=False)), rows, inner]
    right = [*(1 if one else n for n, one in zip(lead[short:], ones[3:], strict=False)), inner, columns]
    a = torch.randn(left if not vectors[0] else [inner])
    b = torch.randn(right if not vectors[1] else [inner])
    model = Calls(lambda m, x, y: x @ y)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    expected = math.prod(batch) * (1 if vectors[0] else rows) * inner * (1 if vectors[1] else columns)
    assert graphprune.count(model, (a, b)).macs == expected


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    causal=st.booleans(),
    named=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_scaled_dot_product_attention(
    batch: int,
    groups: int,
    key_heads: int,
    lengths: tuple[int, int],
    widths: tuple[int, int],
    causal: bool,
    named: bool,
) -> None:
    (queries, keys), (width, value_width), heads = lengths, widths, groups * key_heads
    q = torch.randn(batch, heads, queries, width)
    k, v = torch.randn(batch, key_heads, keys, width), torch.randn(batch, key_heads, keys, value_width)
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": groups > 1}

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if named:
            return F.scaled_dot_product_attention(query=q, key=k, value=v, **options)
        return F.scaled_dot_product_attention(q, k, v, **options)

    found = graphprune.count(Calls(attend), (q, k, v))
    assert found.macs == batch * heads * queries * keys * (width + value_width)
    assert found.per_layer[""].macs == found.macs


@given(
    kind=st.sampled_from(["lstm", "gru", "tanh", "relu"]),
    layers=st.integers(1, 2),
    both=st.booleans(),
    bias=st.booleans(),
    projection=st.integers(0, 2),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
)
@settings(max_examples=30, deadline=None)
def test_recurrent_layers(
    kind: str, layers: int, both: bool, bias: bool, projection: int, sizes: tuple[int, int, int, int]
) -> None:
    batch, steps, inner, extra = sizes
    hidden = projection + extra
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": both, "bias": bias}
    if kind == "lstm":
        model: nn.Module = nn.LSTM(inner, hidden, proj_size=projection, **options)
    elif kind == "gru":
        model = nn.GRU(inner, hidden, **options)
    else:
        model = nn.RNN(inner, hidden, nonlinearity=kind, **options)
    state = projection if kind == "lstm" and projection else hidden
    gates, directions = {"lstm": 4, "gru": 3}.get(kind, 1), 2 if both else 1
    per_step = 0
    for layer in range(layers):
        reads = inner if layer == 0 else state * directions
        per_step += directions * (gates * hidden * (reads + state) + (state * hidden if state != hidden else 0))
    # a projection to the hidden width itself cannot be told from none by its size
    if kind == "lstm" and projection == hidden:
        per_step += layers * directions * state * hidden
    x = torch.randn(steps, batch, inner)
    assert graphprune.count(model, x).macs == steps * batch * per_step
    # On the meta device torch runs the cells one by one, and its counter sees the products.
    assert independent_macs(model.to("meta"), x.to("meta")) == steps * batch * per_step


def test_packed_sequences_count_their_real_steps() -> None:
    for cell, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        model = Calls(lambda m, x: m[0](pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)), cell(3, 4))
        assert graphprune.count(model, torch.randn(2, 5, 3)).per_layer["parts.0"].macs == 8 * gates * 4 * (3 + 4)


def test_bilinear() -> None:
    model = nn.Bilinear(3, 5, 4)
    # x W for every output and y feature, then the sum with y
    expected = 14 * (4 * 3 * 5 + 4 * 5)
    found = graphprune.count(model, (torch.randn(2, 7, 3), torch.randn(2, 7, 5)))
    assert found.macs == expected and found.parameters == 4 * 3 * 5 + 4


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: torch.mv(x, x[0]), 7 * 4),
        (lambda m, x: torch.addmv(x[:, 0], x, x[0]), 7 * 4),
        (lambda m, x: torch.dot(x[0], x[1]), 4),
        (lambda m, x: torch.vdot(x[0], x[1]), 4),
        (lambda m, x: torch.addbmm(x[:4].T[:2, :2], x.view(2, 2, 7), x.view(2, 7, 2)), 2 * 2 * 7 * 2),
        (lambda m, x: F.linear(x, x[0]), 7 * 4),
        (lambda m, x: F.conv_tbc(x.view(7, 2, 2), x[:6].view(3, 2, 4), x[0]), 5 * 2 * 4 * 3 * 2),
        (lambda m, x: torch.mm(x, x.T, out=torch.empty(7, 7)), 7 * 7 * 4),
        (lambda m, x: x.softmax(-1) * x + x.mean() + F.layer_norm(x, (4,)), 0),
        (lambda m, x: x[:0] @ x.T, 0),
    ],
)
def test_single_operators(function: Callable[..., Any], expected: int) -> None:
    found = graphprune.count(Calls(function), torch.randn(7, 4))
    assert found.macs == expected and not found.uncounted


aten = torch.ops.aten


def _float8(x: Tensor) -> tuple[Tensor, ...]:
    a, b = x.new_empty(16, 32).to(torch.float8_e4m3fn), x.new_empty(48, 32).to(torch.float8_e4m3fn)
    return a, b.T, x.new_ones(()), x.new_ones(())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0], 2 * 3 * 7 * 7 * 8),
        (lambda q: aten._scaled_dot_product_efficient_attention(q, q, q, None, False)[0], 2 * 3 * 7 * 7 * 8),
        (lambda q: aten._scaled_dot_product_flash_attention(q.half(), q.half(), q.half())[0], 2 * 3 * 7 * 7 * 8),
        (lambda q: aten._scaled_dot_product_attention_math(q, q, q)[0], 2 * 3 * 7 * 7 * 8),
        (lambda q: aten._addmm_activation(q[0, 0, 0], q[0, 0].T, q[0, 0]), 4 * 7 * 4),
        (lambda q: aten._int_mm(q[0, 0].to(torch.int8), q[0, 0].T.to(torch.int8)), 7 * 4 * 7),
        (lambda q: aten._scaled_mm(*_float8(q)), 16 * 32 * 48),
    ],
)
def test_kernels_called_by_name(function: Callable[[Tensor], Tensor], expected: int) -> None:
    q = torch.empty(2, 3, 7, 4, device="meta")
    found = graphprune.count(Calls(lambda m, x: function(x)), q)
    assert found.macs == expected and not found.uncounted


@pytest.mark.parametrize("flag", [True, False])
def test_convolution_kernels_called_by_name(flag: bool) -> None:
    q = torch.randn(2, 3, 7, 4)
    if flag and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    if flag:
        model = Calls(lambda m, x: aten.mkldnn_convolution(x, x[:, :, :2, :2], None, [0, 0], [1, 1], [1, 1], 1))
    else:
        model = Calls(lambda m, x: aten._slow_conv2d_forward(x, x[:, :, :2, :2], [2, 2], None, [1, 1], [0, 0]))
    found = graphprune.count(model, q)
    assert found.macs == 2 * 18 * 2 * 3 * 4 and not found.uncounted


def test_grouped_matrix_products() -> None:
    # 10 rows shared out among 3 experts of 16 x 24
    rows, experts = torch.empty(10, 16, device="meta").bfloat16(), torch.empty(3, 16, 24, device="meta").bfloat16()
    offsets = torch.empty(3, device="meta", dtype=torch.int32)
    model = Calls(lambda m, a, b, offs: aten._grouped_mm(a, b, offs))
    assert graphprune.count(model, (rows, experts, offsets)).macs == 10 * 16 * 24
    batched = Calls(lambda m, a, b: aten._grouped_mm(a, b))
    assert graphprune.count(batched, (experts.mT.contiguous().mT, experts.mT)).macs == 3 * 16 * 24 * 16


def test_deformable_convolution() -> None:
    ops = pytest.importorskip("torchvision").ops
    model = Calls(lambda m, x: m[0](x, torch.zeros(1, 18, 6, 6)), ops.DeformConv2d(4, 2, 3))
    found = graphprune.count(model, torch.randn(1, 4, 8, 8))
    assert found.macs == 6 * 6 * 2 * 4 * 9 and not found.uncounted


def test_shared_and_repeated_modules() -> None:
    model, inputs = NETWORKS["shared and repeated"]
    layers = graphprune.count(model, inputs).per_layer
    assert layers["parts.0"] == graphprune.LayerCount("Linear", 20, 2 * 3 * 16)
    assert layers["parts.1"] == graphprune.LayerCount("Linear", 20, 3 * 16)
    assert layers[""] == graphprune.LayerCount("Calls", 1, 3 * 16)


def test_tied_parameters_count_once_and_idle_modules_are_listed() -> None:
    tied = nn.Linear(6, 4, bias=False)
    model = Calls(lambda m, x: m[1](m[0](x)), nn.Embedding(4, 6), tied, nn.Linear(3, 3))
    tied.weight = model.parts[0].weight  # type: ignore[assignment]
    found = graphprune.count(model, torch.tensor([[0, 1, 2]]))
    assert found.parameters == 24 + 12 + 1
    assert found.per_layer["parts.0"].parameters == 24 and found.per_layer["parts.1"].parameters == 0
    assert found.per_layer["parts.1"].macs == 3 * 24 and found.per_layer["parts.2"].macs == 0
    check_sums(found, model)


def test_unknown_work_is_said_not_hidden() -> None:
    found = graphprune.count(Calls(lambda m, x: torch.fft.rfft(x).abs() + torch.cdist(x, x).sum()), torch.randn(7, 4))
    assert found.macs == 0 and found.uncounted == {"aten::_fft_r2c": 1, "aten::_cdist_forward": 1}
    assert "not counted: aten::_fft_r2c (1)" in str(found)


def test_custom_operator_is_uncounted() -> None:
    with torch.library._scoped_library("graphprune_counting_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        twice = torch.ops.graphprune_counting_test.twice
        model = Calls(lambda m, x: twice(twice(x)))
        assert graphprune.count(model, torch.randn(2)).uncounted == {"graphprune_counting_test::twice": 2}


def test_batch_size_and_keyword_arguments() -> None:
    model = nn.Linear(3, 4)
    one, many = graphprune.count(model, {"input": torch.randn(1, 3)}), graphprune.count(model, (torch.randn(5, 3),))
    assert (one.batch_size, many.batch_size) == (1, 5) and many.macs == 5 * one.macs
    assert many.macs_per_sample == one.macs == 12
    scalar = graphprune.count(Calls(lambda m, x: m[0].weight @ m[0].weight.T * x, model), torch.tensor(1.0))
    assert scalar.batch_size is None and scalar.macs_per_sample is None and scalar.macs == 4 * 4 * 3


def test_table_and_dict() -> None:
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 2))
    found = graphprune.count(model, torch.randn(10, 300))
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "parameters", "MACs"]
    rows = [line.split() for line in lines if line and not line.startswith("─")]
    assert ["0", "Linear", "120,400", "1,200,000"] in rows and ["2", "Linear", "802", "8,000"] in rows
    assert ["total", "121,202", "1,208,000"] in rows
    assert "MACs of one forward pass at batch size 10" in str(found)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["macs"] == 1_208_000 and data["macs_per_sample"] == 120_800 and data["parameters"] == 121_202
    assert data["per_layer"]["0"] == {"kind": "Linear", "parameters": 120_400, "macs": 1_200_000}
    assert "total" in str(graphprune.count(nn.ReLU(), torch.randn(2)))


def test_the_model_is_left_alone_and_pruned_models_count_less() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.randn(2, 3, 8, 8)
    found = graphprune.count(model, image)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    small = graphprune.count(graphprune.prune(model, image, 0.5), image)
    assert small.macs * 2 == found.macs and small.parameters < found.parameters


def test_errors() -> None:
    with pytest.raises(GraphPruneError, match=r"expected a torch\.nn\.Module, got int"):
        graphprune.count(3, torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="example_input is empty"):
        graphprune.count(nn.Linear(2, 2), ())
    with pytest.raises(GraphPruneError, match=r"shape \(2, 3\)"):
        graphprune.count(nn.Linear(2, 2), torch.randn(2, 3))
    with pytest.raises(GraphPruneError, match="weight has no shape yet; run the model once"):
        graphprune.count(nn.LazyLinear(2), torch.randn(2, 3))
