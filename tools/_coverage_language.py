"""Tiny random configurations of Hugging Face's language, speech and two-sided models, for the coverage sweep."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96
LENGTH = 11
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Fewer key-value heads than query heads, as in most recent decoders.
GROUPED = {"num_key_value_heads": 2}
GPT2_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# name -> (configuration class, what differs from SMALL)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    ),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", GPT2_NAMES),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gptj": ("GPTJConfig", {**GPT2_NAMES, "rotary_dim": 4}),
    "falcon": ("FalconConfig", {}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "stablelm": ("StableLmConfig", GROUPED),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "cohere": ("CohereConfig", GROUPED),
    "granite": ("GraniteConfig", GROUPED),
    "mamba": ("MambaConfig", {"state_size": 6}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "deberta": ("DebertaConfig", {"relative_attention": True, "pos_att_type": "p2c|c2p"}),
    "deberta_v2": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": "p2c|c2p"}),
    "mpnet": ("MPNetConfig", {}),
    "convbert": ("ConvBertConfig", {"embedding_size": 16}),
    "funnel": (
        "FunnelConfig",
        {
            "num_hidden_layers": None,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "longformer": ("LongformerConfig", {"attention_window": 4}),
    "modernbert": ("ModernBertConfig", {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    "mobilebert": (
        "MobileBertConfig",
        {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2},
    ),
    "fnet": ("FNetConfig", {}),
    "squeezebert": ("SqueezeBertConfig", {"embedding_size": 32}),
}
TWO_SIDED = ("t5", "bart", "whisper", "clip", "siglip", "detr", "wav2vec2")


def words(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Token numbers (batch, length), none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def _config(name: str, changes: dict[str, Any]) -> Any:
    arguments = {**SMALL, **changes}
    return getattr(transformers, name)(**{k: v for k, v in arguments.items() if v is not None})


def decoder(name: str) -> tuple[nn.Module, Any]:
    """A language model with its head, called as users call it: the key-value cache comes back too."""
    return transformers.AutoModelForCausalLM.from_config(_config(*DECODERS[name])), {"input_ids": words()}


def encoder(name: str) -> tuple[nn.Module, Any]:
    """An encoder with a classifier of three classes."""
    config = _config(*ENCODERS[name])
    config.num_labels = 3
    length = 12 if name in ("longformer", "funnel") else LENGTH
    example = {"input_ids": words(length=length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    return transformers.AutoModelForSequenceClassification.from_config(config), example


def two_sided(name: str) -> tuple[nn.Module, Any]:
    """Encoder-decoder, image-text, detection and speech models."""
    build: Any = globals()[f"_{name}"]
    model, example = build()
    return model, example


def _t5() -> tuple[nn.Module, Any]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": words(), "decoder_input_ids": words(2, 7)}


def _sides(layers: int = 2) -> dict[str, Any]:
    return {
        "d_model": 32,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }


def _bart() -> tuple[nn.Module, Any]:
    config = transformers.BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_sides())
    return transformers.BartForConditionalGeneration(config), {"input_ids": words(), "decoder_input_ids": words(2, 7)}


def _whisper() -> tuple[nn.Module, Any]:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=10,
        max_source_positions=16,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **_sides(),
    )
    example = {"input_features": torch.randn(2, 10, 32), "decoder_input_ids": words(2, 7)}
    return transformers.WhisperForConditionalGeneration(config), example


def _image_text(kind: str) -> tuple[nn.Module, Any]:
    text = {**SMALL, "projection_dim": 24}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=24)
    example = {"input_ids": words(), "pixel_values": torch.randn(2, 3, 32, 32)}
    return getattr(transformers, f"{kind}Model")(config), example


def _clip() -> tuple[nn.Module, Any]:
    return _image_text("CLIP")


def _siglip() -> tuple[nn.Module, Any]:
    return _image_text("Siglip")


def _detr() -> tuple[nn.Module, Any]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=9, num_labels=5, **_sides()
    )
    return transformers.DetrForObjectDetection(config), {"pixel_values": torch.randn(1, 3, 96, 64)}


def _wav2vec2() -> tuple[nn.Module, Any]:
    config = transformers.Wav2Vec2Config(
        **SMALL,
        apply_spec_augment=False,  # it runs in training only, and the example run does not show it
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 400)}
