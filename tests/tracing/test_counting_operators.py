"""Counts of single operators of random shapes, against formulas and against a second count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import graphprune
from tests.tracing.counting_reference import Calls, independent_macs


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
@settings(max_examples=60)
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
@settings(max_examples=100)
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
@settings(max_examples=40)
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
@settings(max_examples=30)
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
