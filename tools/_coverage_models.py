"""Which models the coverage sweep tries, by library, and how each is built and fed."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from tools import _coverage_images, _coverage_language
from tools import _coverage_networks as networks

Builder = Callable[[], tuple[nn.Module, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to examine.

    `onnx`: the pruned model is exported and compared in ONNX Runtime too, by what happens to the batch size: "free" or
    "fixed" (the code of the model fixes it, so a file for one size is asked for). `heads`: attention heads alone are
    pruned and proven too. `only_eval`: in training mode it needs targets or runs parts that eval mode does not, so a
    training step is not asked for.
    """

    name: str
    build: Builder
    onnx: str = ""
    heads: bool = False
    only_eval: bool = False


# What is exported and compared in ONNX Runtime: all of YOLO, else one or two of a family, as an export takes seconds.
ONNX = {
    "transformers": "llama qwen2 gpt2 mamba bert distilbert t5 whisper clip detr wav2vec2 vit swin convnext segformer",
    "torchvision": "densenet121 efficientnet_b0 mobilenet_v2 resnet50 resnext50_32x4d shufflenet_v2_x0_5 swin_t "
    "vit_b_32 deeplabv3_mobilenet_v3_large fcn_resnet50 r3d_18",
    "timm": "test_vit test_resnet test_convnext test_byobnet cs3darknet_focus_s cait_xxs24_224",
    "smp": "Unet DeepLabV3Plus",
    "diffusers": "unet2d vae",
}
ONNX_FIXED_BATCH = {"ultralytics": " ".join(networks.YOLO)}


def _onnx(name: str) -> str:
    library, _, model = name.partition("/")
    for kind, chosen in (("free", ONNX), ("fixed", ONNX_FIXED_BATCH)):
        if model in chosen.get(library, "").split():
            return kind
    return ""


def _transformers() -> list[Case]:
    out = []
    for family, names in (
        (_coverage_language.decoder, _coverage_language.DECODERS),
        (_coverage_language.encoder, _coverage_language.ENCODERS),
        (_coverage_language.two_sided, _coverage_language.TWO_SIDED),
        (_coverage_images.vision, _coverage_images.VISION),
    ):
        out += [Case(f"transformers/{name}", partial(family, name), heads=True) for name in names]
    return out


def _torchvision() -> list[Case]:
    return [Case(f"torchvision/{name}", partial(networks.classifier, name)) for name in networks.CLASSIFIERS] + [
        Case(f"torchvision/{name}", partial(networks.torchvision_network, name), only_eval=networks.detects(name))
        for name in networks.other_torchvision()
    ]


def _timm() -> list[Case]:
    return [Case(f"timm/{name}", partial(networks.timm_network, name)) for name in networks.timm_names()]


def _ultralytics() -> list[Case]:
    return [Case(f"ultralytics/{name}", partial(networks.yolo, name)) for name in networks.YOLO]


def _segmentation() -> list[Case]:
    return [Case(f"smp/{name}", partial(networks.segmenter, name)) for name in networks.SEGMENTERS]


def _diffusers() -> list[Case]:
    return [Case(f"diffusers/{name}", build) for name, build in networks.DIFFUSERS.items()]


LIBRARIES: dict[str, Callable[[], list[Case]]] = {
    "transformers": _transformers,
    "torchvision": _torchvision,
    "timm": _timm,
    "ultralytics": _ultralytics,
    "smp": _segmentation,
    "diffusers": _diffusers,
}


def cases(patterns: Sequence[str] | None) -> list[Case]:
    """All cases, or those whose name ("library/model") matches a pattern."""
    out = []
    for library, found in LIBRARIES.items():
        if patterns is None or any(fnmatch.fnmatch(library, p.partition("/")[0]) for p in patterns):
            wanted = [c for c in found() if patterns is None or any(fnmatch.fnmatch(c.name, p) for p in patterns)]
            out += [dataclasses.replace(c, onnx=_onnx(c.name)) for c in wanted]
    return out
