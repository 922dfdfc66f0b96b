"""What the measuring tools share: torchvision's networks with weights worth proving anything on, and Markdown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.runtimes.machine import cpu_model, usable_cores
from graphprune.support.files import replacing
from graphprune.tracing.example import ExampleInput

CLASSES = 1000


def all_networks() -> list[str]:
    """Names of torchvision's classification builders, the smallest network first."""
    return sorted(torchvision.models.list_models(torchvision.models), key=parameter_count)


def parameter_count(name: str) -> int:
    """How many parameters the network has, as torchvision states for its weights."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def build(name: str, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The network in eval mode, with torchvision's own initial values."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce that their initialisation will change
        try:
            with torch.device(device):
                model: nn.Module = torchvision.models.get_model(name, weights=None)
        except NotImplementedError:  # RegNet's constructor reads the values of tensors, which the meta device has not
            model = torchvision.models.get_model(name, weights=None).to(device)
    return model.eval()


def example_for(name: str, batch: int = 1, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random images (batch, 3, size, size) of the size that the network is made for: 299 for Inception, else 224."""
    size = 299 if name == "inception_v3" else 224
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)


def classifier_of(model: nn.Module) -> nn.Module:
    """The last layer with one output for each class."""
    found = None
    for module in model.modules():
        if getattr(module, "out_features", None) == CLASSES or getattr(module, "out_channels", None) == CLASSES:
            found = module
    if found is None:
        raise ValueError(f"{type(model).__name__} has no layer with {CLASSES} outputs")
    return found


@torch.no_grad()
def enliven(model: nn.Module, example: Any, seed: int = 0) -> None:
    """Give every parameter and statistic values whose loss or mix-up shows, in place.

    Fresh networks have constant scales, zero biases and layer scales of 1e-6: whatever is done to those changes
    nothing, and a proof on them would prove nothing. Batch statistics become those of `example` (any example input),
    somewhat disturbed, so that activations neither die nor explode.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in [getattr(m, "weight", None)]}
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            layer_scale = 0 < parameter.abs().max() <= 0.01
            if id(parameter) in norms or layer_scale or name.endswith("layer_scale"):
                parameter.copy_(uniform(parameter, 0.6, 1.4))
            elif parameter.any():
                parameter.mul_(uniform(parameter, 0.8, 1.2))
            else:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in batch_norms]
    for norm in batch_norms:
        norm.train()
        norm.momentum = 1.0
    ExampleInput.of(example).call(model)
    for norm, momentum in zip(batch_norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        # Few values go into the last layers' variance; a channel without any would blow up what follows.
        variance.add_(1e-3 + 0.01 * variance.mean())
        mean.add_(uniform(mean, -0.3, 0.3) * variance.sqrt())
        variance.mul_(uniform(variance, 0.7, 1.4))


def parameters_in(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; infinite where shapes differ or something is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# -- circumstances and Markdown


def machine_line(threads: int) -> str:
    """Processor, cores, threads and system in one line."""
    cores = f"{usable_cores()} of {os.cpu_count()} cores usable"
    return f"{cpu_model()}, {cores}, {threads} thread{'s' if threads != 1 else ''}, {platform.system()}"


def versions_line(*packages: str) -> str:
    """Versions of Python and of the packages in one line."""
    found = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join([":--", *["--:"] * (len(headings) - 1)]) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a file; it gets its name once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def width_step(text: str) -> int | str:
    """`--round-to` of the command line: "auto", or a number that widths are multiples of."""
    return text if text == "auto" else int(text)


def widths_line(round_to: int | str) -> str:
    """What `round_to` makes of widths, for a table."""
    return {"auto": "that run well", 1: "any"}.get(round_to, f"multiples of {round_to}")
