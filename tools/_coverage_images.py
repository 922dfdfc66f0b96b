"""Tiny random configurations of Hugging Face's vision models, and the other libraries' networks, for the sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}

# name -> (configuration class, its arguments, image size)
VISION: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViTConfig", _TRANSFORMER, 32),
    "deit": ("DeiTConfig", _TRANSFORMER, 32),
    "beit": ("BeitConfig", {**_TRANSFORMER, "use_relative_position_bias": True}, 32),
    "dinov2": ("Dinov2Config", _TRANSFORMER, 32),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        32,
    ),
    "swinv2": (
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        32,
    ),
    "convnext": ("ConvNextConfig", _PYRAMID, 64),
    "convnextv2": ("ConvNextV2Config", _PYRAMID, 64),
    "segformer": (
        "SegformerConfig",
        {
            **_PYRAMID,
            "num_attention_heads": [1, 2, 4, 8],
            "sr_ratios": [8, 4, 2, 1],
            "mlp_ratios": [2, 2, 2, 2],
            "decoder_hidden_size": 24,
        },
        64,
    ),
    "resnet": ("ResNetConfig", {**_PYRAMID, "embedding_size": 16}, 64),
    "regnet": ("RegNetConfig", {**_PYRAMID, "embedding_size": 16, "groups_width": 8}, 64),
    "mobilevit": (
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 48],
            "num_attention_heads": 4,
        },
        64,
    ),
    "pvt": (
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32, 40],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
        64,
    ),
    "poolformer": ("PoolFormerConfig", _PYRAMID, 64),
    "levit": (
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        64,
    ),
    "focalnet": (
        "FocalNetConfig",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        32,
    ),
    "cvt": (
        "CvtConfig",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
        64,
    ),
}


def vision(name: str) -> tuple[nn.Module, Any]:
    """An image classifier of three classes; `segformer` segments."""
    cls, arguments, size = VISION[name]
    config = getattr(transformers, cls)(**arguments, num_labels=3)
    if name in ("deit", "levit"):  # the automatic class prefers the one with a teacher
        model = getattr(transformers, cls.replace("Config", "ForImageClassification"))(config)
    elif name == "segformer":
        model = transformers.AutoModelForSemanticSegmentation.from_config(config)
    else:
        model = transformers.AutoModelForImageClassification.from_config(config)
    return model, torch.randn(2, 3, size, size)


Builder = Callable[[str], tuple[nn.Module, Any]]
