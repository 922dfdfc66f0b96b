"""Pruned models that come back from `from_pretrained`, and those that no configuration can express."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError
from graphprune.support.settings import settings_of
from tests import oracles


class Config:
    """What Hugging Face's configurations are to us: an object with plain attributes, shared by all modules."""

    def __init__(self, **options: Any) -> None:
        self.hidden, self.heads, self.head_dim, self.inner, self.layers = 16, 4, 4, 20, 2
        self.vocabulary, self.scale_by_width, self.position_width = 11, False, None
        vars(self).update(options)


class Attention(nn.Module):
    """Keeps the features of a head, not how many heads there are."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        self.qkv = nn.ModuleList(nn.Linear(config.hidden, config.heads * config.head_dim) for _ in range(3))
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in self.qkv)
        y: Tensor = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention, then two layers with a width of their own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention, self.norm = Attention(config), nn.LayerNorm(config.hidden)
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Model(nn.Module):
    """A small language model with `save_pretrained` and `from_pretrained`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden, config.vocabulary)
        self.positions = nn.Linear(1, config.position_width or 2 * config.hidden)
        self.mixed = nn.Linear(config.position_width or 2 * config.hidden, config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        if self.config.scale_by_width:
            x = x * self.config.hidden**0.5
        place = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None]
        x = x + self.mixed(self.positions(place).tanh())
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(vars(self.config)))
        safetensors.torch.save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Model:
        made = cls(Config(**json.loads((folder / "config.json").read_text())))
        made.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return made


TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def made(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(Config(**options)).eval()


@pytest.mark.parametrize(
    ("granularity", "changed"),
    [
        ("mlp", {"inner", "position_width"}),
        ("heads", {"heads"}),
        (("heads", "mlp"), {"heads", "inner", "position_width"}),
        (("embedding",), {"hidden", "position_width"}),
        ("auto", {"hidden", "heads", "inner"}),
    ],
)
def test_uniform_widths_go_into_the_configuration(granularity: Any, changed: set[str], tmp_path: Path) -> None:
    model = made()
    before = copy.deepcopy(vars(model.config))
    small = graphprune.prune(model, TOKENS, 0.5, granularity=granularity)
    fit = graphprune.fit_config(small, TOKENS)
    assert fit and {name for name, (old, new) in fit.changes.items() if old != new} == changed, str(fit)
    assert vars(model.config) == before, "the dense model's configuration was touched"
    assert small.layers[0].attention.config is small.config
    small.save_pretrained(tmp_path)
    found = Model.from_pretrained(tmp_path).eval()
    assert oracles.relative_error(found(TOKENS), small(TOKENS)) == 0
    assert not graphprune.fit_config(small, TOKENS).changes, "a second time there is nothing to change"


def test_what_no_configuration_can_say() -> None:
    heads: dict[str, float] = {"layers.0.*": 0.25, "layers.1.*": 0.5}
    for options, arguments, reason in (
        ({}, {"ratio": heads}, "at once|has shape"),
        ({"scale_by_width": True}, {"ratio": 0.5, "granularity": "embedding"}, "computes something else"),
        ({}, {"ratio": 0.5, "output": "graph"}, "became a graph"),
    ):
        model = made(**options)
        small = graphprune.prune(model, TOKENS, **arguments)
        before, values = dict(vars(small.config)), small(TOKENS)
        fit = graphprune.fit_config(small, TOKENS)
        assert not fit and not fit.changes
        assert re.search(reason, fit.reason), fit.reason
        assert vars(small.config) == before and torch.equal(small(TOKENS), values)


class Wide(NamedTuple):
    width: int = 8
    inner: Any = (4,)


class Perceptron(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, settings_of(config)["width"]
        self.up, self.down = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Wide, dict, SimpleNamespace, type("Items", (dict,), {})])
def test_configurations_of_every_kind(make: Any) -> None:
    torch.manual_seed(0)
    model, x = Perceptron(make(width=8, inner=(4,))), torch.randn(2, 3)
    small = graphprune.prune(model, x, 0.5)
    assert graphprune.fit_config(small, x).changes == {"width": (8, 4)}
    assert settings_of(small.config)["width"] == 4 and settings_of(model.config)["width"] == 8
    again = Perceptron(small.config)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x)) and type(small.config) is make


class Keywords(nn.Module):
    """A class in the style of diffusers: entries of the configuration are arguments, numbers in lists among them."""

    def __init__(self, widths: tuple[int, ...] = (6, 6, 6, 6), latent: int = 2) -> None:
        super().__init__()
        self._kept = type("Entries", (dict,), {})(widths=tuple(widths), latent=latent)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True))
        self.last = nn.Linear(widths[-1], latent)

    @property
    def config(self) -> Any:
        return self._kept

    @classmethod
    def from_config(cls, config: Any) -> Keywords:
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = self.last(x)
        return out


def test_a_class_that_takes_its_configuration_as_keywords() -> None:
    torch.manual_seed(0)
    model, x = Keywords((8, 12)), torch.randn(2, 3)
    assert graphprune.fit_config(model, x) and not graphprune.fit_config(model, x).changes
    small = graphprune.prune(model, x, 0.5, round_to=1)
    assert graphprune.fit_config(small, x).changes == {"widths[0]": (8, 4), "widths[1]": (12, 6)}
    again = Keywords.from_config(small.config)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x)) and model.config["widths"] == (8, 12)


class Refusing(nn.Module):
    """Has a configuration, and is not made from it."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(width=width)
        self.up, self.down = nn.Linear(3, width), nn.Linear(width, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))  # type: ignore[no-any-return]


def test_a_class_that_takes_no_configuration() -> None:
    with pytest.raises(GraphPruneError, match=r"Refusing takes width, depth, and no configuration.*transformers"):
        graphprune.fit_config(Refusing(), torch.randn(1, 3))


class Square(nn.Module):
    """One number for two widths that are no longer equal."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.a, self.b = nn.Linear(3, config.width), nn.Linear(config.width, config.width)
        self.c = nn.Linear(config.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())  # type: ignore[no-any-return]


def test_the_reason_is_the_number_that_would_be_two() -> None:
    torch.manual_seed(0)
    model, x = Square(SimpleNamespace(width=8)), torch.randn(2, 3)
    whole = graphprune.prune(model, x, 0.5)
    assert graphprune.fit_config(whole, x).changes == {"width": (8, 4)}
    del model.config  # nothing says that the two are one number
    small = graphprune.prune(model, x, {"a": 0.25, "b": 0.5}, round_to=1)
    small.config = SimpleNamespace(width=8)
    fit = graphprune.fit_config(small, x)
    assert not fit and fit.reason.startswith("config.width cannot be 6 and 4 at once"), fit.reason


def test_models_without_a_configuration() -> None:
    with pytest.raises(GraphPruneError, match="has no configuration object"):
        graphprune.fit_config(nn.Linear(2, 2), torch.randn(1, 2))
    model = made()
    del model.config.inner
    with pytest.raises(GraphPruneError, match=r"Model\(config\) failed"):
        graphprune.fit_config(model, TOKENS)


def _tiny(name: str, config: str, **options: Any) -> Callable[[], tuple[Any, Any]]:
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip

    def build() -> tuple[Any, Any]:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        taken = {k: v for k, v in {**small, **options}.items() if v is not None}
        model = getattr(transformers, name)(getattr(transformers, config)(**taken)).eval()
        tokens = torch.randint(3, 96, (2, 9))
        if name.startswith("ViT"):
            return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
        if name.startswith("Whisper"):
            return model, {"input_features": torch.randn(2, 10, 32), "decoder_input_ids": tokens}
        return model, {"input_ids": tokens, **({"decoder_input_ids": tokens} if name.startswith("T5") else {})}

    return build


SIDES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_attention_heads": 4, "decoder_ffn_dim": 48}  # fmt: skip
HUGGING_FACE: dict[str, tuple[Callable[[], tuple[Any, Any]], Any, set[str]]] = {
    "llama": (_tiny("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2), "auto",
              {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}),
    "qwen2": (_tiny("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2), "auto",
              {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}),
    "qwen3": (_tiny("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8), ("heads", "mlp"),
              {"intermediate_size", "num_attention_heads", "num_key_value_heads"}),
    "gpt2": (_tiny("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64), "auto",
             {"n_embd", "n_head"}),
    "gpt_neox": (_tiny("GPTNeoXForCausalLM", "GPTNeoXConfig"), "auto",
                 {"hidden_size", "intermediate_size", "num_attention_heads"}),
    "bert": (_tiny("BertForSequenceClassification", "BertConfig"), "auto",
             {"hidden_size", "intermediate_size", "num_attention_heads"}),
    "distilbert": (_tiny("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, hidden_dim=48, n_layers=2,
                         n_heads=4), "auto", {"dim", "hidden_dim", "n_heads"}),
    "vit": (_tiny("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, vocab_size=None), "auto",
            {"hidden_size", "intermediate_size", "num_attention_heads"}),
    "t5": (_tiny("T5ForConditionalGeneration", "T5Config", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                 hidden_size=None, num_hidden_layers=None, num_attention_heads=None), "auto", {"num_heads", "d_ff"}),
    "whisper": (_tiny("WhisperForConditionalGeneration", "WhisperConfig", num_mel_bins=10, max_source_positions=16,
                      max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                      decoder_start_token_id=1, hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
                      **SIDES), "mlp", {"encoder_ffn_dim", "decoder_ffn_dim"}),
}  # fmt: skip


_BERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {"embedding_size": 32}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {}),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {}),
}


@pytest.mark.parametrize("name", _BERTS)
def test_poolers_and_heads_of_berts_stay_where_mlps_go(name: str, tmp_path: Path) -> None:
    model_name, config, options = _BERTS[name]
    model, example = _tiny(model_name, config, **options)()
    small = graphprune.prune(model, example, 0.5, granularity="mlp")
    fit = graphprune.fit_config(small, example)
    assert fit and set(fit.changes) == {"intermediate_size"}, str(fit)
    cut = {n for n, p in small.named_parameters() if p.shape != model.get_parameter(n).shape}
    assert cut and all("intermediate" in n or "output.dense" in n for n in cut)
    small.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    assert oracles.relative_error(found(**example).logits, small(**example).logits) == 0


@pytest.mark.parametrize("name", _BERTS)
def test_heads_of_berts_come_back_with_the_stream_or_by_save(name: str, tmp_path: Path) -> None:
    """Their code makes the heads as wide as the stream: both go by one share, or no configuration can say it."""
    model_name, config, options = _BERTS[name]
    model, example = _tiny(model_name, config, **options)()
    whole = graphprune.prune(model, example, 0.5)
    fit = graphprune.fit_config(whole, example)
    assert fit and fit.changes["num_attention_heads"] == (4, 2), str(fit)
    whole.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    assert oracles.relative_error(found(**example).logits, whole(**example).logits) == 0
    heads = graphprune.prune(model, example, 0.5, granularity=["heads", "mlp"])
    reason = graphprune.fit_config(heads, example).reason
    assert reason.startswith("config.hidden_size cannot be 32 and 16 at once"), reason
    graphprune.save(heads, tmp_path / "heads.safetensors")
    again = graphprune.load(tmp_path / "heads.safetensors", model)
    assert oracles.relative_error(again(**example).logits, heads(**example).logits) == 0


def test_an_autoencoder_of_diffusers_encodes_and_decodes() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    model, x = diffusers.AutoencoderKL(**blocks, **sizes, sample_size=16).eval(), torch.randn(1, 3, 16, 16)
    parts = {i.method: i.layers for i in graphprune.doctor(model, x).interfaces}
    assert parts["encode"] == parts["decode"] == ("quant_conv",)
    small = graphprune.prune(model, x, 0.5, ignore=parts["encode"])
    latent = small.encode(x).latent_dist.mode()
    assert latent.shape == model.encode(x).latent_dist.mode().shape == (1, 4, 8, 8)
    assert torch.equal(small.decode(latent).sample, small(x).sample)
    fit = graphprune.fit_config(small, x)
    assert fit.changes == {"block_out_channels[0]": (16, 8), "block_out_channels[1]": (32, 16)}, str(fit)
    again = diffusers.AutoencoderKL.from_config(small.config).eval()
    again.load_state_dict(small.state_dict())
    assert oracles.relative_error(again(x).sample, small(x).sample) == 0


def test_a_unet_of_diffusers_is_compared_with_itself() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
    model, x = diffusers.UNet2DModel(**blocks, **sizes).eval(), (torch.randn(1, 3, 16, 16), torch.tensor([5]))
    assert graphprune.fit_config(model, x) and not graphprune.fit_config(model, x).changes
    small = graphprune.prune(model, x, 0.5)
    fit = graphprune.fit_config(small, x)
    named = re.findall(r"([\w.]+)\.(?:in|out)_(?:channels|features)", fit.reason)
    assert not fit and len(named) == 2 and set(named) <= set(dict(small.named_modules())), fit.reason


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_come_back(name: str, tmp_path: Path) -> None:
    build, granularity, changed = HUGGING_FACE[name]
    model, example = build()
    before = model.config.to_dict()
    small = graphprune.prune(model, example, 0.5, granularity=granularity)
    fit = graphprune.fit_config(small, example)
    assert fit and {n for n, (old, new) in fit.changes.items() if old != new} == changed, str(fit)
    assert model.config.to_dict() == before
    small.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in found.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert oracles.relative_error(found(**example), small(**example)) == 0
