"""Which nodes of an ONNX graph to quantise: layers with weights, and what lies between them.

Quantisers take all that they know. Between a convolution and the next one an operator in float means two conversions;
but where no layer follows - sums of a residual stream before a norm or a mean, scores with a mask of -1e38, boxes that
a detector decodes - 8 bits lose accuracy, or everything, and save no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WITH_WEIGHTS = frozenset(["Conv", "Gemm", "MatMul"])
# Operators with kernels for integers, or that only move values.
_OF_ONE = frozenset(
    "Sigmoid LeakyRelu Clip Relu MaxPool AveragePool GlobalAveragePool Reshape Transpose Squeeze Unsqueeze Flatten "
    "Resize Slice Split Pad".split()
)
_OF_SEVERAL = frozenset(["Add", "Mul", "Concat"])
_BETWEEN = _OF_ONE | _OF_SEVERAL
# Without kernels for integers. An activation is one step with the layer before it, also where a mean follows.
_MEANS = frozenset(["ReduceMean", "Dropout", "Identity"])


def between_layers(graph: Any) -> list[str]:
    """Names of the nodes of an `onnx.GraphProto`: convolutions and matrix products with a constant, and the operators
    that lie between two of them. Empty without such a layer."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {out for node in graph.node if node.op_type == "Constant" for out in node.output}
    layers = {
        id(n) for n in graph.node if n.op_type in _WITH_WEIGHTS and len(n.input) > 1 and n.input[1] in constants
    }
    near = _leading_to(layers, graph.node, _BETWEEN)
    far = _leading_to(layers, graph.node, _BETWEEN | _MEANS)
    integer: set[str] = set()
    names = []
    # Nodes are in the order of computation.
    for node in graph.node:
        leads = id(node) in (near if node.op_type in _OF_SEVERAL else far)
        kept = id(node) in layers or (node.op_type in _BETWEEN and leads and not integer.isdisjoint(node.input))
        if kept:
            names.append(node.name)
        if kept or (node.op_type in _MEANS and not integer.isdisjoint(node.input)):
            integer.update(node.output)
    return names


def _leading_to(layers: set[int], nodes: Any, through: Iterable[str]) -> set[int]:
    """The nodes whose results reach a layer through nothing but operators of the kinds `through`."""
    wanted: set[str] = set()
    found: set[int] = set()
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            found.add(id(node))
            if node.op_type in through and id(node) not in layers:
                wanted.update(node.input)
        if id(node) in layers:
            wanted.add(node.input[0])
    return found
