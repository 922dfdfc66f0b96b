"""torchvision's, timm's and other libraries' networks for the coverage sweep: small images, random weights."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from tools._common import write

Built = tuple[nn.Module, Any]

# One of each family; `python -m tools.sweep` tries every classification network of torchvision.
CLASSIFIERS = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"
).split()
_CLASSIFIER_SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_b_32": 224}


def classifier(name: str) -> Built:
    """A torchvision classification network of ten classes."""
    options: dict[str, Any] = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if options:
        options["init_weights"] = False
    size = _CLASSIFIER_SIZES.get(name, 128)
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options), torch.randn(2, 3, size, size)


def other_torchvision() -> list[str]:
    """Every builder of torchvision that is no classifier and has weights in floating point."""
    models = torchvision.models
    parts = (models.segmentation, models.detection, models.video, models.optical_flow)
    return [name for part in parts for name in models.list_models(part)]


def detects(name: str) -> bool:
    """Detectors want targets in training mode."""
    return name in torchvision.models.list_models(torchvision.models.detection)


def torchvision_network(name: str) -> Built:
    """A segmentation, detection, video or optical flow network and what it is fed."""
    models = torchvision.models
    options: dict[str, Any] = {"weights": None}
    if name not in models.list_models(models.optical_flow) and name not in models.list_models(models.video):
        options["weights_backbone"] = None
    if name in models.list_models(models.segmentation):
        return models.get_model(name, num_classes=5, **options), torch.randn(2, 3, 64, 64)
    if detects(name):
        size = 320 if "ssd" in name else 128
        if "ssd" not in name:
            options |= {"min_size": size, "max_size": size}
        # Random weights are sure of nothing: without this nothing would be detected and nothing proven.
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
        images = 2 if "ssd" in name else 1  # its last maps are single pixels: no batch statistics from one of them
        return models.get_model(name, num_classes=5, **options), ([torch.rand(3, size, size) for _ in range(images)],)
    if name in models.list_models(models.optical_flow):
        return models.get_model(name, weights=None), (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    frames, size = (16, 224) if name.startswith("mvit") else (8, 64) if name.startswith("swin3d") else (14, 224)
    if not name.startswith(("mvit", "swin3d", "s3d")):
        frames, size = 4, 64
    return models.get_model(name, weights=None, num_classes=5), torch.randn(1, 3, frames, size, size)


def timm_names(cache: Path = Path("build/coverage/timm.json")) -> list[str]:
    """The smallest model of each model module of timm, by parameters on the meta device.

    Building all of timm takes minutes, so the names are kept in `cache` with timm's version.
    """
    import timm

    if cache.exists():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["timm"] == timm.__version__:
            return list(known["names"])
    names = [name for module in timm.list_modules() if (name := _smallest(timm.list_models(module=module)))]
    write(cache, json.dumps({"timm": timm.__version__, "names": names}))
    return names


def _smallest(names: Sequence[str]) -> str | None:
    import timm

    counts: dict[str, int] = {}
    for name in names:
        with torch.device("meta"), contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(counts, key=counts.__getitem__, default=None)


def timm_network(name: str) -> Built:
    """A timm network on the smallest square it takes (its default, or 64 where that works)."""
    import timm

    model = timm.create_model(name, num_classes=10).eval()
    size = model.default_cfg.get("input_size", (3, 224, 224))
    small = torch.randn(2, size[0], 96, 96)
    if not model.default_cfg.get("fixed_input_size"):
        with contextlib.suppress(Exception), torch.no_grad():
            model(small)
            return model, small
    return model, torch.randn(2, *size)


YOLO = tuple(
    f"{base}{task}"
    for base, tasks in (
        ("yolov5nu", ("",)),
        ("yolov8n", ("", "-seg", "-pose", "-cls", "-obb")),
        ("yolo11n", ("", "-seg", "-pose", "-cls", "-obb")),
        ("yolo12n", ("", "-seg", "-pose", "-cls")),
    )
    for task in tasks
)


def yolo(name: str) -> Built:
    """An ultralytics network built from its YAML."""
    from ultralytics import YOLO as Yolo

    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = Yolo(f"{name.replace('nu', 'n')}.yaml").model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.float(), torch.rand(1, 3, 64, 64)


SEGMENTERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer".split()


def segmenter(name: str) -> Built:
    """A segmentation network of segmentation_models_pytorch on a ResNet-18."""
    import segmentation_models_pytorch as smp

    size = 128 if name == "PAN" else 64  # it pools its smallest maps
    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3), torch.randn(2, 3, size, size)


def _unet() -> Built:
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    return model, {"sample": torch.randn(1, 3, 16, 16), "timestep": torch.tensor(3)}


def _conditional_unet() -> Built:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    states = {"encoder_hidden_states": torch.randn(1, 5, 24)}
    return model, {"sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor(3), **states}


def _vae() -> Built:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, torch.randn(1, 3, 16, 16)


DIFFUSERS: dict[str, Callable[[], Built]] = {"unet2d": _unet, "unet2d_conditional": _conditional_unet, "vae": _vae}
