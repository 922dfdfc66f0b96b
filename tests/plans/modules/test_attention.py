"""Attention with free widths against torch's own, and against torch's own with zeroed slices."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.plans.modules.attention import MultiheadAttention
from graphprune.tracing.attention import attend


class Network(nn.Module):
    """A random attention between two linear layers, called in a random way."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        torch.manual_seed(seed)
        heads, features = choose.choice([1, 2, 3, 4]), choose.choice([2, 3, 4])
        width = heads * features
        kdim, vdim = choose.choice([(None, None), (5, 7), (width, 3)])
        self.cross = kdim is not None or choose.random() < 0.4
        batched, first = choose.random() < 0.8, choose.random() < 0.5
        self.attention = nn.MultiheadAttention(
            width, heads, bias=choose.random() < 0.8, add_bias_kv=choose.random() < 0.3,
            add_zero_attn=choose.random() < 0.3, kdim=kdim, vdim=vdim, batch_first=first,
        )  # fmt: skip
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        queries, keys, batch = 4, 5 if self.cross else 4, 2

        def tokens(length: int, size: int) -> Tensor:
            if not batched:
                return torch.randn(length, size)
            return torch.randn((batch, length, size) if first else (length, batch, size))

        self.example = (tokens(queries, width), tokens(keys, kdim or width), tokens(keys, vdim or width))
        self.options: dict[str, Any] = {"need_weights": choose.random() < 0.5}
        self.options["average_attn_weights"] = choose.random() < 0.5
        self._masks(choose, batch if batched else 0, heads, queries, keys)

    def _masks(self, choose: random.Random, batch: int, heads: int, queries: int, keys: int) -> None:
        if choose.random() < 0.4:
            ones = torch.rand(queries, keys) < 0.3
            self.options["attn_mask"] = torch.randn(queries, keys) if choose.random() < 0.5 else ones
        elif batch and choose.random() < 0.3:
            self.options["attn_mask"] = torch.randn(batch * heads, queries, keys)
        elif queries == keys and choose.random() < 0.5:
            self.options["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(queries)
            self.options["is_causal"] = True
        if choose.random() < 0.3:
            padding = torch.zeros((batch, keys) if batch else (keys,), dtype=torch.bool)
            padding[..., -1] = True
            mask = self.options.get("attn_mask")
            if mask is not None and mask.dtype != torch.bool:
                padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
            self.options["key_padding_mask"] = padding

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        query = self.before(query)
        out, weights = self.attention(
            query, *((key, value) if self.cross else (query, query)), **self.options
        )
        return self.after(out), weights


@pytest.mark.parametrize("start", range(0, 150, 50))
def test_it_computes_what_torch_computes(start: int) -> None:
    for seed in range(start, start + 50):
        network = Network(seed).eval()
        query, key, value = network.example
        if not network.cross:
            key = value = query
        with torch.no_grad():
            want = network.attention(query, key, value, **network.options)
            got = attend(network.attention, query, key, value, **network.options)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, s=seed: f"{s}: {m}")


@pytest.mark.parametrize("granularity", ["heads", "head features", "channels"])
def test_one_granularity_at_a_time(granularity: str) -> None:
    """`prune` proves each result by permutation and zero equivalence; here: that something goes, and only that."""
    smaller = 0
    for seed in range(40):
        network = Network(seed).eval()
        old = network.attention
        if old.num_heads == 1:  # then the features are plain channels
            continue
        new = graphprune.prune(network, network.example, 0.5, granularity=granularity).attention
        heads = new.num_heads < old.num_heads
        features = new.out_proj.weight.shape[1] // new.num_heads < old.head_dim
        width = new.out_proj.weight.shape[0] < old.embed_dim
        assert (heads, features, width) == tuple(
            granularity == kind and found
            for kind, found in (("heads", heads), ("head features", features), ("channels", width))
        ), seed
        smaller += heads or features or width
    assert smaller >= 12


def test_zeroed_by_hand() -> None:
    torch.manual_seed(1)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    network, x = Residual().eval(), torch.randn(2, 5, 12)
    plan = graphprune.plan(network, x, 0.34, granularity="heads")
    small = plan.apply(network)
    attention = small.attention
    assert type(network.attention) is nn.MultiheadAttention and type(attention) is MultiheadAttention
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, 4, 12)
    assert attention.in_proj_weight.shape == (24, 12) and attention.out_proj.weight.shape == (12, 8)
    assert attention.scale == 4**-0.5
    lost = set(range(12)) - {i for i in range(12) if i not in plan.removed["attention.out_proj.weight"][1]}
    assert len(lost) == 4 and len({i // 4 for i in lost}) == 1
    zeroed = copy.deepcopy(network)
    with torch.no_grad():
        zeroed.attention.out_proj.weight[:, sorted(lost)] = 0
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-5, atol=1e-5)
    assert set(small.state_dict()) == set(network.state_dict())


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(2)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True), 2)


def test_encoder_with_a_fixed_embedding_loses_heads_and_feed_forward_width() -> None:
    """In eval mode torch has a fused path for the whole layer, and nested tensors for padded batches."""
    model = encoder().eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    example = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": padding}
    small = graphprune.prune(model, example, 0.5, granularity=["heads", "channels"])
    for layer in small.layers:
        assert layer.self_attn.num_heads == 2 and layer.linear1.out_features == 12
        assert layer.self_attn.in_proj_weight.shape == (24, 16)
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]
    other = {"src": torch.randn(3, 7, 16), "src_key_padding_mask": padding}
    with torch.no_grad():
        nested, plain = small(**other), small.train()(**other)
    torch.testing.assert_close(nested[~padding], plain[~padding], rtol=1e-4, atol=1e-5)
    assert not nested[padding].any()  # as torch's own encoder has it


def test_decoder() -> None:
    torch.manual_seed(3)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), 1).eval()
    example = (torch.randn(2, 4, 16), torch.randn(2, 5, 16))
    small = graphprune.prune(model, example, 0.5, granularity=["heads", "head features", "channels"])
    (layer,) = small.layers
    for attention in (layer.self_attn, layer.multihead_attn):
        assert type(attention) is MultiheadAttention and attention.num_heads == 2 and attention.head_dim == 2
        assert attention.scale == 4**-0.5  # the temperature stays
    assert layer.linear1.out_features == 12


def test_trains_is_copied_pruned_again_and_exported(tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    small = graphprune.prune(model, x, 0.5, granularity="heads").train()
    small(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in small.named_parameters() if "weight" in n)
    again = graphprune.prune(copy.deepcopy(small), x, 0.5, granularity=["heads", "head features"])
    assert [layer.self_attn.num_heads for layer in again.layers] == [1, 1]
    assert all(layer.self_attn.head_dim == 2 and layer.self_attn.scale == 4**-0.5 for layer in again.layers)
    report = graphprune.export_onnx(again.eval(), x, tmp_path / "encoder.onnx")
    assert report.max_relative_error is not None and report.max_relative_error < 1e-4


def test_classes_of_the_users_own_stay() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Mine(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x)[0]  # type: ignore[no-any-return]

    small = graphprune.prune(Residual(), torch.randn(5, 2, 12), 0.5)
    assert type(small.attention) is Mine and small.attention.num_heads == 3


def test_torch_is_as_before() -> None:
    original = nn.MultiheadAttention.forward
    graphprune.trace(encoder(), torch.randn(2, 5, 16))
    assert nn.MultiheadAttention.forward is original
    with pytest.raises(graphprune.GraphPruneError):
        graphprune.trace(encoder(), torch.randn(2, 5, 17))
    assert nn.MultiheadAttention.forward is original


def test_a_causal_hint_without_a_mask_is_an_error_as_in_torch() -> None:
    attention, x = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    for call in (attention, lambda *a, **k: attend(attention, *a, **k)):
        with pytest.raises(RuntimeError, match="is_causal"):
            call(x, x, x, is_causal=True)
