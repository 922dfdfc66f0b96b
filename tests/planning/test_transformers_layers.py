"""Layers left out of Hugging Face's networks: tiny ones with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphprune
from graphprune.dependency.whole.blocks import find_blocks
from graphprune.plans.surgery import remove_layers, uncounted_tokens
from graphprune.plans.verification import bypassed, verify_layers

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"vocab_size": 50, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
WORDS = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **TEXT, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, **TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 1}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**SIZES, **TEXT}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 16, "patch_size": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
}


def network(name: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model whose layers matter (fresh ones are nearly the identity), and an example input."""
    kind, config, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and name != "t5":
                parameter.mul_(8)
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    return model, {"input_ids": WORDS, **({"decoder_input_ids": WORDS[:, :5]} if name == "t5" else {})}


def logits(model: Any, example: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**example).logits
    return out


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_and_saved_and_loaded(name: str, ratio: float, tmp_path: Path) -> None:
    model, example = network(name)
    plan = graphprune.plan(model, example, ratio, granularity="layer")
    found = len(find_blocks(model, example))
    assert len(plan.layers) == round(ratio * found) and found >= 4
    small = graphprune.prune(model, example, ratio, granularity="layer")
    with bypassed(model, plan.layers):
        wanted = logits(model, example)
    got = logits(small, example)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert not torch.allclose(got, logits(model, example), rtol=1e-2)
    if all(block.listed for block in plan.layers):
        if name != "t5":
            assert small.config.num_hidden_layers == 4 - len(plan.layers)
        small.save_pretrained(tmp_path)
        assert logits(type(small).from_pretrained(tmp_path).eval(), example).equal(got)


def test_scales_by_depth_stay_what_they_were(tmp_path: Path) -> None:
    options = {"scale_attn_by_inverse_layer_idx": True}
    model, example = network("gpt2", **options)
    blocks = [find_blocks(model, example)[i] for i in (0, 2)]
    small = remove_layers(model, blocks)
    assert [h.attn.scaling for h in small.transformer.h] == [model.transformer.h[i].attn.scaling for i in (1, 3)]
    with bypassed(model, blocks):
        wanted = logits(model, example)
    torch.testing.assert_close(logits(small, example), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    pruned = graphprune.prune(model, example, 0.5, granularity="layer", criterion="magnitude")
    graphprune.save(pruned, tmp_path / "small.safetensors")
    loaded = graphprune.load(tmp_path / "small.safetensors", network("gpt2", **options)[0])
    assert logits(loaded, example).equal(logits(pruned, example))


def in_two_steps(model: Any) -> Tensor:
    """Logits of the last three tokens; the others come from the cache of keys and values."""
    with torch.no_grad():
        cache = model(input_ids=WORDS[:, :6], use_cache=True).past_key_values
        out: Tensor = model(input_ids=WORDS[:, 6:], past_key_values=cache, use_cache=True).logits
    return out


def generated(model: Any) -> tuple[Tensor, Tensor]:
    """Twelve more tokens, the first sentence padded to the left, and the logits of each."""
    mask = torch.ones_like(WORDS)
    mask[0, :3] = 0
    out = model.generate(
        WORDS, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_caches_of_keys_and_values_go_on_working(name: str, gone: tuple[int, ...]) -> None:
    model, example = network(name)
    blocks = [find_blocks(model, example)[i] for i in gone]
    small = remove_layers(model, blocks)
    with bypassed(model, blocks):
        last, (words, scores) = logits(model, {"input_ids": WORDS})[:, 6:], generated(model)
    torch.testing.assert_close(in_two_steps(small), last, rtol=1e-4, atol=1e-4 * float(last.abs().max()))
    found, own = generated(small)
    assert found.equal(words) and scores.std() > 0.1
    torch.testing.assert_close(own, scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_bypasses_in_the_first_place_lose_count_of_tokens() -> None:
    """Why a plan has none: one run cannot show it."""
    model, example = network("gpt2")
    blocks = [dataclasses.replace(block, listed=False) for block in find_blocks(model, example)]
    for gone in ([0], [1], [0, 2], [1, 2, 3]):
        chosen = [blocks[i] for i in gone]
        small = remove_layers(model, chosen)
        assert verify_layers(model, small, chosen, example).passed
        with bypassed(model, chosen):
            wanted = logits(model, {"input_ids": WORDS})[:, 6:]
        assert bool(uncounted_tokens(model, chosen)) is not torch.allclose(in_two_steps(small), wanted, rtol=1e-3)


PARTS = {
    "gemma2": (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    "bert": (("attention.self", "attention.output.dense"), ("intermediate", "output.dense")),
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "vit", "bert"])
def test_branches(name: str, tmp_path: Path) -> None:
    model, example = network(name)
    plan = graphprune.plan(model, example, 0.99, granularity="branch")
    caching = name in ("llama", "gemma2", "gpt2")  # the first attention counts the tokens of the cache
    assert len(plan.layers) == (7 if caching else 8) and any("cache" in line for line in plan.frozen) == caching
    if name in PARTS:
        layer = plan.layers[-1].module.partition(".3.")[0] + ".3."
        assert [b.modules for b in plan.layers[-2:]] == [tuple(layer + part for part in pair) for pair in PARTS[name]]
    plan = graphprune.plan(model, example, 0.5, granularity="branch", criterion="magnitude")
    small = graphprune.prune(model, example, 0.5, granularity="branch", criterion="magnitude")
    with bypassed(model, plan.layers):
        wanted = logits(model, example)
        if caching:
            last = logits(model, {"input_ids": WORDS})[:, 6:]
            torch.testing.assert_close(in_two_steps(small), last, rtol=1e-4, atol=1e-4 * float(last.abs().max()))
    assert logits(small, example).equal(wanted) and len(plan.layers) == 4
    assert small.config.num_hidden_layers == 4 and graphprune.verify(model, small, plan, example).passed
    graphprune.save(small, tmp_path / "small.safetensors")
    assert logits(graphprune.load(tmp_path / "small.safetensors", network(name)[0]), example).equal(wanted)


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_branches_of_several_modules_are_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, example = network(name, **({"use_cache": False} if name == "gemma2" else {}))
    small = graphprune.prune(model, example, 0.5, granularity="branch")
    report = graphprune.export_onnx(small, example, tmp_path / "small.onnx")
    assert report.max_relative_error is not None and report.max_relative_error < 1e-4
