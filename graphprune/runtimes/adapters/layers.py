"""Which nodes of an ONNX graph to quantise: layers with weights, and what lies between them.

Quantisers take all that they know. Between a convolution and the next one an operator in float means two conversions;
but where no layer follows - sums of a residual stream before a layer norm, scores with a mask of -1e38, boxes that a
detector decodes - 8 bits lose accuracy, or everything, and save no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Operators with kernels for integers, or that only move values.
_BETWEEN = frozenset(
    "Add Mul Sigmoid LeakyRelu Clip Relu MaxPool AveragePool GlobalAveragePool Concat Reshape Transpose Squeeze "
    "Unsqueeze Flatten Resize Slice Split Pad".split()
)
# These have none, but pass values on: a layer after a mean still takes what the layer before it gave.
_PASSED = frozenset(["ReduceMean", "Dropout", "Identity"])
_WITH_WEIGHTS = frozenset(["Conv", "Gemm", "MatMul"])


def between_layers(graph: Any) -> list[str]:
    """Names of the nodes of an `onnx.GraphProto`: convolutions and matrix products with a constant, and the operators
    that lie between two of them. Empty without such a layer."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {out for node in graph.node if node.op_type == "Constant" for out in node.output}
    layers = [n for n in graph.node if n.op_type in _WITH_WEIGHTS and len(n.input) > 1 and n.input[1] in constants]
    others = [node for node in graph.node if node.op_type in _BETWEEN | _PASSED]
    after = _reached(layers, others, forward=True)
    before = _reached(layers, others, forward=False)
    kept = {id(node) for node in layers}
    kept |= {id(n) for n in others if n.op_type in _BETWEEN and id(n) in after and id(n) in before}
    return [node.name for node in graph.node if id(node) in kept]


def _reached(layers: Iterable[Any], others: list[Any], *, forward: bool) -> set[int]:
    """Those of `others` that follow a layer, or lead to one, with nothing but each other in between."""
    values = {v for node in layers for v in (node.output if forward else node.input[:1])}
    found: set[int] = set()
    # Nodes are in the order of computation.
    for node in others if forward else reversed(others):
        taken, given = (node.input, node.output) if forward else (node.output, node.input)
        if not values.isdisjoint(taken):
            found.add(id(node))
            values.update(given)
    return found
