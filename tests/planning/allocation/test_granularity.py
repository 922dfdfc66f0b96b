"""One kind of width at a time: heads, their features, hidden widths, the embedding width; and all of them together.

What was really removed is read off the removed indices by a table, written by hand, of what the axes of each network's
parameters are: an axis of heads times features must lose whole heads, or the same number of features of every head.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import graphprune
from graphprune import GraphPruneError
from tests import standins

# What each name of an axis may be cut by
ASKED = {
    "heads": {"heads"},
    "head features": {"qk", "v"},
    "qk features": {"qk"},
    "v features": {"v"},
    "mlp": {"mlp"},
    "embedding": {"embedding"},
}
TOGETHER = ("heads", "head features", "mlp", "embedding")


@dataclasses.dataclass(frozen=True)
class Network:
    """`axes`: pattern of a parameter's name -> what each axis is. "heads*qk" is heads times the features of each;
    "a|b" is parts of equal length side by side; "-" must stay. `features`: per head. `modes`: where not "module", the
    output mode that a granularity needs; None where the code ties it to something else, whatever the mode.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    features: int
    axes: dict[str, tuple[str, ...]]
    modes: dict[str, str | None] = dataclasses.field(default_factory=dict)
    package: str = ""


def _vit() -> tuple[nn.Module, Any]:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    )
    return model, torch.randn(2, 3, 32, 32)


def _swin() -> tuple[nn.Module, Any]:
    model = torchvision.models.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], mlp_ratio=1.5, stochastic_depth_prob=0.0, num_classes=10
    )
    return model, torch.randn(2, 3, 64, 64)


def _timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        import timm

        model = getattr(timm.models, name)(embed_dim=32, mlp_ratio=1.5, num_classes=10, **options)
        return model, torch.randn(2, 3, options["img_size"], options["img_size"])

    return build


def _hugging_face(name: str, config: str, inputs: dict[str, Any], **options: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, Any]:
        import transformers

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return getattr(transformers, name)(getattr(transformers, config)(**sizes, **options)), inputs

    return build


FUSED, STREAM = ("heads*qk|heads*qk|heads*v", "embedding"), ("embedding",)
APART = {"qk features": "hybrid", "v features": "hybrid"}
NEVER: dict[str, str | None] = {"qk features": None, "v features": None}  # q, k and v lie on one axis
BLOCKS = {"mlp.*(0|fc1).weight": ("mlp", "embedding"), "mlp.*(3|fc2).weight": ("embedding", "mlp")}
SEPARATE = {
    r"(q_proj|query|k_proj|key|\.q|\.k).weight": ("heads*qk", "embedding"),
    "(q_proj|query|k_proj|key).bias": ("heads*qk",),
    r"(v_proj|value|\.v).weight": ("heads*v", "embedding"),
    "(v_proj|value).bias": ("heads*v",),
    r"(o_proj|out_proj|attention.dense|attention.output.dense|\.o).weight": ("embedding", "heads*v"),
}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16}

NETWORKS = {
    "torchvision ViT": Network(
        _vit,
        8,
        {
            "in_proj_weight": FUSED,
            "in_proj_bias": FUSED[:1],
            "out_proj.weight": ("embedding", "heads*v"),
            **BLOCKS,
            "conv_proj.weight": ("embedding", "-", "-", "-"),
            "class_token|pos_embedding": ("-", "-", "embedding"),
            "heads.head.weight": ("-", "embedding"),
        },
    ),
    "torchvision Swin": Network(
        _swin,
        16,
        {
            "qkv.weight": FUSED,
            "qkv.bias": FUSED[:1],
            "attn.proj.weight": ("embedding", "heads*v"),
            "bias_table": ("-", "heads"),
            **BLOCKS,
            "features.0.0.weight": ("embedding", "-", "-", "-"),
            "reduction.weight": ("embedding", "embedding"),
            "head.weight": ("-", "embedding"),
        },
        {**NEVER, **dict.fromkeys(("heads", "head features", "embedding"), "hybrid")},
    ),
    "timm ViT": Network(
        _timm("VisionTransformer", img_size=32, patch_size=8, depth=2, num_heads=4),
        8,
        {
            "qkv.weight": FUSED,
            "qkv.bias": FUSED[:1],
            "attn.proj.weight": ("embedding", "heads*v"),
            **BLOCKS,
            "patch_embed.proj.weight": ("embedding", "-", "-", "-"),
            "cls_token|pos_embed": ("-", "-", "embedding"),
            "head.weight": ("-", "embedding"),
        },
        NEVER,
        "timm",
    ),
    "timm Swin": Network(
        _timm("SwinTransformer", img_size=64, patch_size=4, window_size=4, depths=(2, 2), num_heads=(2, 4)),
        16,
        {
            "qkv.weight": FUSED,
            "qkv.bias": FUSED[:1],
            "attn.proj.weight": ("embedding", "heads*v"),
            "bias_table": ("-", "heads"),
            **BLOCKS,
            "patch_embed.proj.weight": ("embedding", "-", "-", "-"),
            "reduction.weight": ("embedding", "embedding"),
            "head.*weight": ("-", "embedding"),
        },
        NEVER,
        "timm",
    ),
    "Hugging Face ViT": Network(
        _hugging_face(
            "ViTForImageClassification",
            "ViTConfig",
            {"pixel_values": torch.randn(2, 3, 32, 32)},
            image_size=32,
            patch_size=8,
        ),
        8,
        {
            **SEPARATE,
            **BLOCKS,
            "projection.weight": ("embedding", "-", "-", "-"),
            "cls_token|position_embeddings": ("-", "-", "embedding"),
            "classifier.weight": ("-", "embedding"),
        },
        APART,
        "transformers",
    ),
    "Hugging Face BERT": Network(
        _hugging_face("BertForSequenceClassification", "BertConfig", {"input_ids": standins.words()}, **TEXT),
        8,
        {
            **SEPARATE,
            "intermediate.dense.weight": ("mlp", "embedding"),
            r"\d.output.dense.weight": ("embedding", "mlp"),
            "embeddings.weight": ("-", "embedding"),
            "pooler.dense.weight": ("embedding", "embedding"),
            "pooler.dense.bias": ("embedding",),
            "classifier.weight": ("-", "embedding"),
        },
        APART,
        "transformers",
    ),
    "Hugging Face Llama": Network(
        _hugging_face(
            "LlamaForCausalLM",
            "LlamaConfig",
            {"input_ids": standins.words(), "use_cache": False},
            num_key_value_heads=2,
            **TEXT,
        ),
        8,
        {
            **SEPARATE,
            "gate_proj.weight|up_proj.weight": ("mlp", "embedding"),
            "down_proj.weight": ("embedding", "mlp"),
            "embed_tokens.weight|lm_head.weight": ("-", "embedding"),
            "inv_freq": ("qk",),
        },
        APART,
        "transformers",
    ),
    "as BERT": Network(
        lambda: (standins.Bert(), standins.words()),
        6,
        {
            **SEPARATE,
            "intermediate.weight": ("mlp", "embedding"),
            "output.weight": ("embedding", "mlp"),
            "word.weight|position.weight": ("-", "embedding"),
            "classifier.weight": ("-", "embedding"),
        },
        APART,
    ),
    "as Llama": Network(
        lambda: (standins.Llama(), standins.words()),
        8,
        {
            **SEPARATE,
            "gate_proj.weight|up_proj.weight": ("mlp", "embedding"),
            "down_proj.weight": ("embedding", "mlp"),
            "embed_tokens.weight|lm_head.weight": ("-", "embedding"),
            "inv_freq": ("qk",),
        },
        APART,
    ),
    "as T5": Network(
        lambda: (standins.T5(), (standins.words(), standins.words(5))),
        5,
        {
            **SEPARATE,
            "attention_bias.weight": ("-", "heads"),
            "wi.weight": ("mlp", "embedding"),
            "wo.weight": ("embedding", "mlp"),
            "shared.weight|lm_head.weight": ("-", "embedding"),
        },
        APART,
    ),
    "as Whisper": Network(
        lambda: (standins.Whisper(), (torch.randn(2, 10, 16), standins.words())),
        6,
        {
            **SEPARATE,
            "fc1.weight": ("mlp", "embedding"),
            "fc2.weight": ("embedding", "mlp"),
            "conv1.weight|conv1.bias": ("stem", "-", "-"),
            "conv2.weight": ("embedding", "stem", "-"),
            "sounds.weight|positions.weight|words.weight": ("-", "embedding"),
        },
        APART,
    ),
}
# Tensors with one axis are biases and scales of the stream, or of a hidden layer where they belong to its first layer.
HIDDEN_BIAS = re.compile(r"(mlp.*(0|fc1)|fc1|intermediate(\.dense)?)\.bias$")
CASES = list(itertools.product(NETWORKS, [*ASKED, TOGETHER]))


def losses(network: Network, plan: graphprune.Plan, model: nn.Module) -> set[str]:
    """Which of the widths in `axes` lost something. Fails where a loss is not a whole number of their units."""
    found: set[str] = set()
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, removed in plan.removed.items():
        meanings = next((m for p, m in network.axes.items() if re.search(rf"({p})$", name)), None)
        if meanings is None:
            assert tensors[name].dim() == 1, f"the table says nothing of {name}"
            meanings = ("mlp",) if HIDDEN_BIAS.search(name) else STREAM
        for axis, indices in removed.items():
            kept = np.ones(tensors[name].shape[axis], bool)
            kept[list(indices)] = False
            parts = meanings[axis].split("|")
            for meaning, part in zip(parts, np.split(kept, len(parts)), strict=True):
                found |= _lost(meaning, part, network.features, f"{name}[{axis}]")
    return found


def _lost(meaning: str, kept: np.ndarray, features: int, where: str) -> set[str]:
    if kept.all():
        return set()
    assert meaning != "-", f"{where} must stay"
    if "*" not in meaning:
        return {meaning}
    grid = kept.reshape(-1, features)
    heads, inside = grid.any(1), grid.sum(1)
    assert len(set(inside[heads].tolist())) == 1, f"{where}: heads of different widths"
    names = meaning.split("*")
    return {n for n, whole in zip(names, (heads.all(), inside.max() == features), strict=True) if not whole}


def prepared(name: str) -> tuple[Network, nn.Module, Any]:
    network = NETWORKS[name]
    if network.package:
        pytest.importorskip(network.package)
    torch.manual_seed(0)
    model, example = network.build()
    with torch.no_grad():
        for parameter in model.parameters():  # class tokens and position tables start as zeros: removing them shows not
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return network, model.eval(), example


def first_mode(model: nn.Module, example: Any, granularity: Any, ratio: float = 0.5) -> graphprune.Plan | None:
    """The plan in the least intrusive output mode in which anything goes; None where nothing ever does."""
    for mode in ("module", "hybrid", "graph"):
        try:
            plan = graphprune.plan(model, example, ratio, granularity=granularity, output=mode)
        except GraphPruneError:  # no graph can stand for the whole network
            continue
        if not plan.empty:
            return plan
    return None


@pytest.mark.parametrize(("name", "granularity"), CASES, ids=[f"{n}-{g if g in ASKED else 'all'}" for n, g in CASES])
def test_what_is_asked_goes_and_nothing_else(name: str, granularity: Any) -> None:
    network, model, example = prepared(name)
    plan = first_mode(model, example, granularity)
    wanted = set().union(*(ASKED[g] for g in ([granularity] if granularity in ASKED else granularity)))
    mode = network.modes.get(granularity, "module")
    if mode is None:
        assert plan is None
        return
    assert plan is not None and plan.output == mode
    assert losses(network, plan, model) == wanted
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, example)
    assert report.passed, report
    assert all(not math.isnan(c.error) for c in report.checks if c.name not in ("forward", "state"))
    assert parameters(small) < parameters(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_by_default_heads_and_hidden_widths_go_and_features_stay(name: str) -> None:
    network, model, example = prepared(name)
    plan = graphprune.plan(model, example, 0.5)
    assert losses(network, plan, model) - {"stem"} == {"heads", "mlp", "embedding"}
    assert graphprune.verify(model, plan.apply(model), plan, example).passed


def test_features_go_where_no_whole_head_would() -> None:
    network, model, example = prepared("as BERT")
    # less than half of one of four heads
    found = losses(network, graphprune.plan(model, example, 0.1, round_to=1), model)
    assert "heads" not in found and {"qk", "v"} <= found
    rounded = graphprune.plan(model, example, 0.5, round_to=3)
    assert "heads" in losses(network, rounded, model)
    rounded = graphprune.plan(model, example, 0.5, min_channels=4, round_to=1)
    assert "heads" not in losses(network, rounded, model) and {"qk", "v"} <= losses(network, rounded, model)


def test_a_budget_takes_heads_whole_too() -> None:
    network, model, example = prepared("as BERT")
    plan = graphprune.plan(model, example, budget=graphprune.Budget(macs=0.4))
    assert {"heads"} <= losses(network, plan, model) <= {"heads", "mlp", "embedding"}
    assert graphprune.verify(model, plan.apply(model), plan, example).passed


def test_names_are_checked_before_the_model_runs() -> None:
    with pytest.raises(GraphPruneError, match=r"unknown granularity 'widths'.* Known: auto, channels, mlp, "):
        graphprune.plan(nn.Linear(2, 2), "no input at all", granularity=["heads", "widths"])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class OneKeyHead(nn.Module):
    """Every query head reads the same head of keys and values, repeated as many decoders repeat it."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.groups = 4, 6
        self.q, self.out = nn.Linear(10, 24), nn.Linear(24, 10)
        self.k, self.v = nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.features)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (standins.repeat_kv(y, self.groups) for y in (k, v))
        mixed = (torch.softmax(q @ k.transpose(2, 3) / 2, -1) @ v).transpose(1, 2)
        return x + self.out(mixed.reshape(*x.shape[:-1], -1))


class OneKeyHeadFused(OneKeyHead):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.features)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5).transpose(1, 2)
        return x + self.out(mixed.reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize("kind", [OneKeyHead, OneKeyHeadFused])
@pytest.mark.parametrize("granularity", ["auto", "heads"])
def test_query_heads_that_share_one_key_head_go(kind: type[OneKeyHead], granularity: str) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 10)
    plan = graphprune.plan(model, x, 0.5, granularity=granularity, ignore=["out"])
    small = plan.apply(model)
    assert small.q.out_features == small.out.in_features == 12 and small.k.out_features == 4
    assert small.groups == (3 if kind is OneKeyHead else 6)
    assert graphprune.verify(model, small, plan, x).passed
    # by hand: whole heads of four
    gone = np.zeros(24, bool)
    gone[list(plan.removed["q.weight"][0])] = True
    assert set(gone.reshape(6, 4).sum(1).tolist()) == {0, 4}
    kept = torch.from_numpy(np.nonzero(~gone)[0])
    wide = model.k(x), model.v(x)
    total = x + model.out.bias
    for head in kept.view(-1, 4):
        scores = torch.softmax(model.q(x)[..., head] @ wide[0].mT / 2, -1)
        total = total + scores @ wide[1] @ model.out.weight[:, head].T
    torch.testing.assert_close(small(x), total)


class FixedHeads(nn.Module):
    """The number of heads is written out: they stay, and their features go instead."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.qkv, self.out = nn.Linear(12, 96), nn.Linear(32, 12)
        self.end = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (y.reshape(b, n, -1, self.width).transpose(1, 2) for y in self.qkv(x).split(4 * self.width, -1))
        mixed = (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)
        return self.end(torch.relu(self.out(mixed)))


def test_features_go_where_a_size_in_the_code_holds_the_heads() -> None:
    torch.manual_seed(0)
    model, x = FixedHeads().eval(), torch.randn(2, 5, 12)
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    assert (small.width, small.qkv.out_features, small.out.in_features) == (4, 48, 16)
    assert graphprune.verify(model, small, plan, x).passed
    assert graphprune.plan(model, x, 0.5, granularity="heads").empty
    rewritten = graphprune.plan(model, x, 0.5, granularity="heads", output="hybrid")
    assert not rewritten.empty and graphprune.verify(model, rewritten.apply(model), rewritten, x).passed


class ShowsWeights(standins.BertAttention):
    """The mean of the attention weights over the heads is part of the output."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        q, k, v = (self.transpose_for_scores(f(x)) for f in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.mT / math.sqrt(self.attention_head_size), -1)
        context = (weights @ v).permute(0, 2, 1, 3).flatten(2)
        return self.norm(self.dense(context) + x), weights.mean(1)


def test_a_mean_over_heads_keeps_them_by_default() -> None:
    torch.manual_seed(0)
    model, x = ShowsWeights(24, 4).eval(), torch.randn(2, 5, 24)
    plan = graphprune.plan(model, x, 0.5)
    assert not plan.statistics and plan.apply(model).num_attention_heads == 4
    assert {g.kind for g in plan.groups if g.kept < g.size} == {"qk feature", "v feature"}
    asked = graphprune.plan(model, x, 0.5, granularity="heads")
    assert asked.statistics and asked.apply(model).num_attention_heads == 2
    assert graphprune.verify(model, asked.apply(model), asked, x).passed
