"""Which nodes of an ONNX graph to quantise: layers with weights, and what lies between them.

Quantisers take all that they know. Between a convolution and the next one an operator in float means two conversions;
but where no layer follows - sums of a residual stream before a norm or a mean, scores with a mask of -1e38, boxes that
a detector decodes - 8 bits lose accuracy, or everything, and save no time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    nodes = list(graph.node)
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {out for node in nodes if node.op_type == "Constant" for out in node.output}
    layers = [n.op_type in _WITH_WEIGHTS and len(n.input) > 1 and n.input[1] in constants for n in nodes]
    near = _leading_to(layers, nodes, _BETWEEN)
    far = _leading_to(layers, nodes, _BETWEEN | _MEANS)
    integer: set[str] = set()
    names = []
    # Nodes are in the order of computation.
    for index, node in enumerate(nodes):
        leads = near[index] if node.op_type in _OF_SEVERAL else far[index]
        follows = not integer.isdisjoint(node.input)
        kept = layers[index] or (node.op_type in _BETWEEN and leads and follows)
        if kept:
            names.append(node.name)
        if kept or (node.op_type in _MEANS and follows):
            integer.update(node.output)
    return names


def _leading_to(layers: Sequence[bool], nodes: Sequence[Any], through: Collection[str]) -> list[bool]:
    """For each node, whether its result reaches a layer through nothing but operators of the kinds `through`."""
    wanted: set[str] = set()
    found = [False] * len(nodes)
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        found[index] = not wanted.isdisjoint(node.output)
        if layers[index]:
            wanted.add(node.input[0])
        elif found[index] and node.op_type in through:
            wanted.update(node.input)
    return found
