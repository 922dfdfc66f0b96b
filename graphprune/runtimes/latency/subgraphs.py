"""ONNX sub-graphs of single computations, many in one file, as the exporter would write them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .kernels import Sample

_OPSET, _IR = 18, 9


@dataclasses.dataclass
class Subgraphs:
    """A model in which every sample stands alone, on inputs that samples of equal shape share.

    `model`: the serialised file. `feeds`: an array for every input. `outputs`: name of each sample's result."""

    model: bytes
    feeds: dict[str, np.ndarray]
    outputs: list[str]


class _Builder:
    """Collects nodes. Values do not matter for time, but denormal numbers and zeros may: all are ordinary."""

    def __init__(self) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.helper, self.numpy_helper, self.float = helper, numpy_helper, TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.results: list[Any] = []
        self.rng = np.random.default_rng(0)
        self._pool = self.rng.standard_normal(1 << 16).astype(np.float32)

    def values(self, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
        return (np.resize(self._pool, math.prod(shape)) * np.float32(scale)).reshape(shape)

    def input(self, shape: Sequence[int]) -> str:
        name = "x_" + "_".join(map(str, shape))
        if name not in self.feeds:
            self.feeds[name] = self.values(shape)
        return name

    def weight(self, name: str, shape: Sequence[int], fan_in: int) -> str:
        self.initializers.append(self.numpy_helper.from_array(self.values(shape, fan_in**-0.5), name))
        return name

    def add(self, index: int, sample: Sample) -> str:
        kernel, n = sample.kernel, sample.lengths
        result = f"y{index}"
        if kernel.op == "matmul":
            batch, rows, inner, columns = n
            inputs = [self.input((batch, rows, inner)), self.input((batch, inner, columns))]
            self.nodes.append(self.helper.make_node("MatMul", inputs, [result], name=result))
            shape: tuple[int, ...] = (batch, rows, columns)
        elif kernel.op == "linear":
            rows, inner, columns = n
            inputs = [self.input((rows, inner)), self.weight(f"w{index}", (columns, inner), inner)]
            inputs.append(self.weight(f"b{index}", (columns,), 1))
            self.nodes.append(self.helper.make_node("Gemm", inputs, [result], name=result, transB=1))
            shape = (rows, columns)
        else:
            shape = self._convolution(index, sample, result)
        self.results.append(self.helper.make_tensor_value_info(result, self.float, shape))
        return result

    def _convolution(self, index: int, sample: Sample, result: str) -> tuple[int, ...]:
        kernel, groups = sample.kernel, groups_of(sample)
        inputs, outputs = channels_of(sample)
        inside = (inputs, outputs // groups) if kernel.transposed else (outputs, inputs // groups)
        names = [
            self.input((kernel.shape[0], inputs, *kernel.shape[1:])),
            self.weight(f"w{index}", (*inside, *kernel.kernel), inputs // groups * math.prod(kernel.kernel)),
            self.weight(f"b{index}", (outputs,), 1),
        ]
        attributes: dict[str, Any] = {
            "kernel_shape": kernel.kernel,
            "strides": kernel.stride,
            "pads": kernel.padding * 2,
            "dilations": kernel.dilation,
            "group": groups,
        }
        if kernel.transposed and any(kernel.output_padding):
            attributes["output_padding"] = kernel.output_padding
        operator = "ConvTranspose" if kernel.transposed else "Conv"
        self.nodes.append(self.helper.make_node(operator, names, [result], name=result, **attributes))
        return (kernel.shape[0], outputs, *sites_after(sample))


def groups_of(sample: Sample) -> int:
    """Groups of a convolution."""
    return sample.lengths[0] if sample.kernel.op in ("depthwise", "grouped") else 1


def channels_of(sample: Sample) -> tuple[int, int]:
    """Channels that a convolution reads and makes."""
    n = sample.lengths
    if sample.kernel.op == "depthwise":
        return n[0], n[0] * sample.kernel.multiplier
    if sample.kernel.op == "grouped":
        return n[0] * n[1], n[0] * n[2]
    return n[0], n[1]


def sites_after(sample: Sample) -> tuple[int, ...]:
    """Spatial sizes of a convolution's result."""
    k = sample.kernel
    out = []
    extra = k.output_padding or (0,) * len(k.kernel)
    for size, kernel, stride, pad, dilation, more in zip(
        k.shape[1:], k.kernel, k.stride, k.padding, k.dilation, extra, strict=True
    ):
        reach = dilation * (kernel - 1)
        if k.transposed:
            out.append((size - 1) * stride - 2 * pad + reach + more + 1)
        else:
            out.append((size + 2 * pad - reach - 1) // stride + 1)
    return tuple(out)


def subgraphs(samples: Sequence[Sample]) -> Subgraphs:
    """One file with all `samples`."""
    builder = _Builder()
    outputs = [builder.add(i, sample) for i, sample in enumerate(samples)]
    inputs = [
        builder.helper.make_tensor_value_info(name, builder.float, value.shape) for name, value in builder.feeds.items()
    ]
    graph = builder.helper.make_graph(builder.nodes, "samples", inputs, builder.results, builder.initializers)
    opsets = [builder.helper.make_opsetid("", _OPSET)]
    model = builder.helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    return Subgraphs(model.SerializeToString(), builder.feeds, outputs)
