"""What is quantised: layers with weights and what lies between two of them, against a search of all paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, TensorProto, helper, numpy_helper

from graphprune.runtimes.adapters.layers import between_layers

LAYERS = ("Conv", "MatMul", "Gemm")
BETWEEN = ("Add", "Mul", "Relu", "Concat", "Clip", "MaxPool")
PASSED = ("ReduceMean",)
BREAKS = ("Softmax", "LayerNormalization", "Gelu")


def graph(nodes: list[tuple[str, str, list[str]]]) -> GraphProto:
    """Nodes as (operator, name = output, inputs); "w" is a constant, "x" the input."""
    made = [helper.make_node(kind, inputs, [name], name=name) for kind, name, inputs in nodes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info(nodes[-1][1], TensorProto.FLOAT, [1])
    return helper.make_graph(made, "g", [x], [y], [numpy_helper.from_array(np.zeros(1, np.float32), "w")])


def slow(found: GraphProto) -> list[str]:
    """Follow every path from every node, one at a time."""
    nodes = {node.name: node for node in found.node}

    def is_layer(node: Any) -> bool:
        return node.op_type in LAYERS and node.input[1] == "w"

    def through(node: Any) -> bool:
        return node.op_type in BETWEEN + PASSED

    def from_layer(name: str) -> bool:
        node = nodes.get(name)
        return node is not None and (is_layer(node) or (through(node) and any(from_layer(i) for i in node.input)))

    def to_layer(name: str) -> bool:
        users = [node for node in found.node if name in node.input]
        return any((is_layer(u) and u.input[0] == name) or (through(u) and to_layer(u.name)) for u in users)

    return [
        name
        for name, node in nodes.items()
        if is_layer(node)
        or (node.op_type in BETWEEN and any(from_layer(i) for i in node.input) and to_layer(name))
    ]


def test_a_residual_network_is_quantised_up_to_its_last_layer() -> None:
    found = graph([
        ("Conv", "a", ["x", "w"]), ("Relu", "b", ["a"]), ("Conv", "c", ["b", "w"]), ("Add", "d", ["b", "c"]),
        ("ReduceMean", "e", ["d"]), ("Gemm", "f", ["e", "w"]), ("Mul", "g", ["f", "w"]),
    ])  # fmt: skip
    assert between_layers(found) == ["a", "b", "c", "d", "f"]


def test_a_residual_stream_and_scores_stay_float() -> None:
    found = graph([
        ("MatMul", "q", ["x", "w"]), ("MatMul", "k", ["x", "w"]), ("MatMul", "scores", ["q", "k"]),
        ("Add", "masked", ["scores", "w"]), ("Softmax", "p", ["masked"]), ("MatMul", "mixed", ["p", "k"]),
        ("MatMul", "out", ["mixed", "w"]), ("Add", "stream", ["x", "out"]),
        ("LayerNormalization", "norm", ["stream", "w"]), ("MatMul", "up", ["norm", "w"]), ("Relu", "r", ["up"]),
        ("MatMul", "down", ["r", "w"]), ("Add", "end", ["stream", "down"]),
    ])  # fmt: skip
    assert between_layers(found) == ["q", "k", "out", "up", "r", "down"]


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_a_search_of_all_paths(seed: int) -> None:
    random = np.random.default_rng(seed)
    nodes: list[tuple[str, str, list[str]]] = []
    for number in range(14):
        earlier = ["x", *(name for _, name, _ in nodes)][-5:]
        kind = str(random.choice([*LAYERS, *BETWEEN, *PASSED, *BREAKS]))
        first, second = (str(n) for n in random.choice(earlier, 2))
        two = [first, "w" if kind in LAYERS and random.random() < 0.8 else second]
        nodes.append((kind, f"n{number}", two if kind in (*LAYERS, "Add", "Mul", "Concat") else [first]))
    found = graph(nodes)
    assert between_layers(found) == slow(found)


def test_nothing_to_quantise() -> None:
    assert between_layers(graph([("Relu", "a", ["x"]), ("Add", "b", ["a", "w"])])) == []
