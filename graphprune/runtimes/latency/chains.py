"""Chains of two or three computations with one free width between them: what a width costs with all it brings along,
such as changes of layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..profiles import profile
from ..providers import Provider
from .kernels import Kernel
from .stairs import ChainMeter

# Lengths beside the one that varies, spatial size, rows of products. Calls in a row, rounds.
BESIDE, SIDE, ROWS = 64, 14, 196
_RUNS, _ROUNDS = 10, 8
KINDS = ("conv", "pointwise", "depthwise", "linear", "matmul")


def kind_of(kernel: Kernel) -> str | None:
    """Which stairs the widths of a kernel follow; None for kinds that are not scanned."""
    if kernel.op == "conv":
        return "pointwise" if kernel.pointwise else "conv"
    return kernel.op if kernel.op in KINDS else None


@dataclasses.dataclass
class _Chain:
    nodes: list[Any]
    weights: list[Any]
    input: tuple[str, tuple[int, ...]]
    output: tuple[str, tuple[int, ...]]


def make_chain_meter(provider: Provider, threads: int, options: dict[str, str]) -> ChainMeter:
    """Measures chains in ONNX Runtime, one file per width: the lowest of a few rounds over all widths, so that what
    slows the machine down for a while does not look like a stair. On a CPU with one thread: stairs are registers and
    tiles, and threads that wait for each other only hide them."""
    threads = 1 if provider.device == "cpu" else threads

    def measure(kind: str, widths: Sequence[int]) -> list[float]:
        models = [chain_file(kind, int(w))[:2] for w in widths]
        rounds = [[_seconds(made, provider, threads, options) for made in models] for _ in range(_ROUNDS)]
        return [min(times) for times in zip(*rounds, strict=True)]

    return measure


def _seconds(made: tuple[bytes, dict[str, np.ndarray]], provider: Provider, threads: int, options: Any) -> float:
    return profile(made[0], made[1], provider, threads=threads, options=options, runs=_RUNS).fastest


def chain_file(kind: str, width: int) -> tuple[bytes, dict[str, np.ndarray], str]:
    """An ONNX file, its inputs, and the name of its result."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    chain = _products(kind, width) if kind in ("linear", "matmul") else _convolutions(kind, width)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * np.float32(0.05), name)
        for name, shape in chain.weights
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (chain.input, chain.output)]
    graph = helper.make_graph(chain.nodes, "chain", [infos[0]], [infos[1]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    feeds = {chain.input[0]: rng.standard_normal(chain.input[1]).astype(np.float32)}
    return model.SerializeToString(), feeds, chain.output[0]


def _convolutions(kind: str, width: int) -> _Chain:
    from onnx import helper

    k = 3 if kind == "conv" else 1
    plan = [(BESIDE, width, k, 1), (width, BESIDE, k, 1)]
    if kind == "depthwise":
        plan.insert(1, (width, width, 3, width))
    nodes: list[Any] = []
    weights: list[Any] = []
    value = "x"
    for i, (inputs, outputs, size, groups) in enumerate(plan):
        weights += [(f"w{i}", (outputs, inputs // groups, size, size)), (f"b{i}", (outputs,))]
        pads = [size // 2] * 4
        names = [value, f"w{i}", f"b{i}"]
        nodes.append(helper.make_node("Conv", names, [f"c{i}"], kernel_shape=[size] * 2, pads=pads, group=groups))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        value = f"r{i}"
    shape = (1, BESIDE, SIDE, SIDE)
    return _Chain(nodes, weights, ("x", shape), (value, shape))


def _products(kind: str, width: int) -> _Chain:
    from onnx import helper

    if kind == "linear":
        nodes = [
            helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], transB=1),
        ]
        shapes: list[Any] = [("w0", (width, BESIDE)), ("b0", (width,)), ("w1", (BESIDE, width)), ("b1", (BESIDE,))]
        return _Chain(nodes, shapes, ("x", (ROWS, BESIDE)), ("y", (ROWS, BESIDE)))
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    return _Chain(nodes, [("w0", (1, BESIDE, width))], ("x", (1, ROWS, BESIDE)), ("y", (1, ROWS, ROWS)))
