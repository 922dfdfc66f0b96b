"""Forms of a program that converters take, beside the program as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.runtimes.adapters.forms import simpler


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._function(x)


def _indexed(x: Tensor) -> tuple[Tensor, ...]:
    parts = x.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return parts[0], parts[-1], parts[1]


def operators(module: nn.Module) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0),
        lambda x: x.reshape(2, 5, 3, 2, 4).permute(0, 3, -1, 1, 2).unbind(-1),
        lambda x: x.reshape(2, 5, 3, 8).unbind(2),
        lambda x: x.unflatten(-1, (3, 2, 4)).unbind(-3),
        _indexed,
    ],
)
def test_equal_without_the_axis(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 5, 24)
    module = simpler(torch.export.export(Calls(function), (x,)).module())
    assert "aten.chunk.default" in operators(module)
    assert operators(module).isdisjoint({"aten.unbind.int", "aten.select.int"})
    other = torch.randn(2, 5, 24)
    for got, wanted in zip(module(other), function(other), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "function",
    [
        # Interleaved: every third channel is no slice.
        lambda x: x.reshape(2, 5, 8, 3).unbind(-1),
        lambda x: x.reshape(2, 5, 2, 3, 4).permute(3, 0, 2, 1, 4).unbind(0),
        # Another axis than the last was split, or none, or axes were joined.
        lambda x: x.reshape(2, 5, 3, 8).unbind(1),
        lambda x: x.reshape(10, 24).unbind(1),
        lambda x: x.unbind(1),
        lambda x: x.transpose(1, 2).reshape(2, 3, 40).unbind(1),
    ],
)
def test_left_alone_where_it_is_not_the_same(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 5, 24)
    module = simpler(torch.export.export(Calls(function), (x,)).module())
    assert "aten.chunk.default" not in operators(module)
    for got, wanted in zip(module(x), function(x), strict=True):
        assert torch.equal(got, wanted)


def test_matrix_transposes_are_transposes() -> None:
    x = torch.randn(2, 3, 4)
    module = simpler(torch.export.export(Calls(lambda x: (x.mT + 1, x.mT @ x)), (x,)).module())
    assert "aten.mT.default" not in operators(module)
    first, second = module(x)
    assert torch.equal(first, x.transpose(1, 2) + 1) and torch.equal(second, x.transpose(1, 2) @ x)
