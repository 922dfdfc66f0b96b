"""What is quantised: layers with weights and what lies between two of them, against a search of all paths."""

from __future__ import annotations

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

    def is_layer(name: str) -> bool:
        return name in nodes and nodes[name].op_type in LAYERS and nodes[name].input[1] == "w"

    def to_layer(name: str, through: tuple[str, ...]) -> bool:
        users = [user for user, node in nodes.items() if name in node.input]
        return any(
            (is_layer(u) and nodes[u].input[0] == name) or (nodes[u].op_type in through and to_layer(u, through))
            for u in users
        )

    def integer(name: str) -> bool:
        passed = name in nodes and nodes[name].op_type in PASSED and any(map(integer, nodes[name].input))
        return kept(name) or passed

    def kept(name: str) -> bool:
        if is_layer(name):
            return True
        if name not in nodes or nodes[name].op_type not in BETWEEN:
            return False
        through = BETWEEN if nodes[name].op_type in ("Add", "Mul", "Concat") else BETWEEN + PASSED
        return any(map(integer, nodes[name].input)) and to_layer(name, through)

    return [name for name in nodes if kept(name)]


def test_convolutions_with_a_shortcut() -> None:
    """All up to the last convolution; the sum before the mean stays float, an activation after a layer does not."""
    found = graph([
        ("Conv", "a", ["x", "w"]), ("Relu", "b", ["a"]), ("Conv", "c", ["b", "w"]), ("Add", "d", ["b", "c"]),
        ("Relu", "e", ["d"]), ("Conv", "f", ["e", "w"]), ("Add", "g", ["e", "f"]), ("Relu", "h", ["g"]),
        ("ReduceMean", "i", ["h"]), ("Gemm", "j", ["i", "w"]), ("Mul", "k", ["j", "w"]),
    ])  # fmt: skip
    assert between_layers(found) == ["a", "b", "c", "d", "e", "f", "j"]
    found = graph([
        ("Conv", "a", ["x", "w"]), ("Clip", "b", ["a"]), ("ReduceMean", "c", ["b"]), ("Gemm", "d", ["c", "w"]),
    ])  # fmt: skip
    assert between_layers(found) == ["a", "b", "d"]


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
