"""Single computations and chains as modules, for runtimes that are written from programs of torch: what `subgraphs` and
`chains` write as ONNX files."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .chains import BESIDE, ROWS, SIDE
from .kernels import Sample
from .subgraphs import channels_of, groups_of

_CONVOLUTIONS: dict[bool, tuple[Any, ...]] = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
Program = tuple[nn.Module, tuple[Tensor, ...]]


class _Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class _Squared(nn.Module):
    """Rows by rows of what a layer makes, as attention has it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made @ made.transpose(1, 2)


def tiny_module() -> Program:
    """Next to nothing: what every call takes."""
    return nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(1, 8, generator=_generator()),)


def sample_module(sample: Sample) -> Program:
    """One computation, with inputs."""
    kernel, n = sample.kernel, sample.lengths
    if kernel.op == "matmul":
        batch, rows, inner, columns = n
        return _Product(), (_values(batch, rows, inner), _values(batch, inner, columns))
    if kernel.op == "linear":
        rows, inner, columns = n
        return nn.Sequential(nn.Linear(inner, columns)).eval(), (_values(rows, inner),)
    inputs, outputs = channels_of(sample)
    return nn.Sequential(_convolution(sample, inputs, outputs)).eval(), (
        _values(kernel.shape[0], inputs, *kernel.shape[1:]),
    )


def _convolution(sample: Sample, inputs: int, outputs: int) -> nn.Module:
    kernel = sample.kernel
    kind = _CONVOLUTIONS[kernel.transposed][len(kernel.kernel) - 1]
    more = {"output_padding": kernel.output_padding} if kernel.output_padding else {}
    made: nn.Module = kind(
        inputs, outputs, kernel.kernel, kernel.stride, kernel.padding, dilation=kernel.dilation,
        groups=groups_of(sample), **more,
    )  # fmt: skip
    return made


def chain_module(kind: str, width: int) -> Program:
    """A chain with one free width, with inputs."""
    if kind == "linear":
        layers = nn.Sequential(nn.Linear(BESIDE, width), nn.ReLU(), nn.Linear(width, BESIDE))
        return layers.eval(), (_values(ROWS, BESIDE),)
    if kind == "matmul":
        return _Squared(nn.Linear(BESIDE, width, bias=False)).eval(), (_values(1, ROWS, BESIDE),)
    size = 3 if kind == "conv" else 1
    between = [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU()] if kind == "depthwise" else []
    convolutions = nn.Sequential(
        nn.Conv2d(BESIDE, width, size, padding=size // 2), nn.ReLU(), *between,
        nn.Conv2d(width, BESIDE, size, padding=size // 2), nn.ReLU(),
    )  # fmt: skip
    return convolutions.eval(), (_values(1, BESIDE, SIDE, SIDE),)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _values(*shape: int) -> Tensor:
    return torch.randn(math.prod(shape), generator=_generator()).reshape(shape)
