"""Where in a model the operators are that an error names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.runtimes.adapters.naming import first_lines, first_of
from graphprune.runtimes.adapters.places import in_layers, layer, layers_named, listed, place_of


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs().softmax(-1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.fc(x))[:, :1].expand(-1, 4)
        return x.cumsum(-1)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Net().eval(), (torch.randn(2, 4),))


def test_layers_of_the_operators_that_a_message_names(program: torch.export.ExportedProgram) -> None:
    for message in ("no aten::softmax.int", "aten._softmax.default is unknown", "STABLEHLO_SOFTMAX, version 1"):
        assert layers_named(program, message) == " (in blocks.0, blocks.1)"
    assert layers_named(program, "aten.linear and softmax") == " (in fc, blocks.0, blocks.1)"
    assert layers_named(program, "softmaxes") == layers_named(program, "aten.cumsum") == ""


def test_the_place_of_one_operator(program: torch.export.ExportedProgram) -> None:
    assert place_of(program, "aten::fft_rfft") == place_of(program, "torch.rfft") == " (in module 'blocks.0', Inner)"
    assert place_of(program, "cumsum") == " (in the forward of the model itself)"
    assert place_of(program, "nothing") == ""
    kinds = {layer(node) for node in program.graph.nodes if node.op == "call_function"}
    assert kinds == {"", "fc", "blocks.0", "blocks.1"}


def test_lists_end_somewhere() -> None:
    assert in_layers(["a", "", "b", "a", "c", "d", "e"]) == " (in a, b, c and 2 more)"
    assert listed([("add", "a"), ("mean", ""), ("add", "b")]) == "add x 2 (in a, b), mean"


def test_the_first_lines_of_an_error() -> None:
    assert first_lines(ValueError("\n one.\n\ntwo \nthree")) == "ValueError: one. two"
    assert first_lines(ValueError("one.\ntwo"), 1) == "ValueError: one"
    assert first_lines(KeyError()) == "KeyError" and first_of(" \n") == ""
    assert len(first_of("x" * 5000)) == 500
