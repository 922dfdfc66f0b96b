from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.arguments import FlatArguments, named_outputs, unique
from tests.runtimes.nets import ConvNet, TokenNet


def test_names_come_from_the_signature() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    flat = FlatArguments.of((ids, mask), TokenNet())
    assert flat.names == ("ids", "mask")
    flat = FlatArguments.of({"mask": None, "ids": ids, "extra": {"bias": torch.ones(8)}, "flag": False}, TokenNet())
    assert flat.names == ("ids", "extra_bias")
    assert flat.batched == (True, False)
    assert flat.batch_size == 2


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1))

    def forward(self, x: Any, *rest: Any) -> Any:
        return x + self.x + sum(rest)


def test_names_of_variable_arguments_and_of_parameters() -> None:
    flat = FlatArguments.of((torch.ones(2), torch.ones(2), [torch.ones(2), 3]), Star())
    # "x" is the name of a parameter already.
    assert flat.names == ("x_1", "rest_0", "rest_1_0")
    assert FlatArguments.of((torch.ones(2), torch.ones(2))).names == ("input_0", "input_1")


def test_rebuild_puts_tensors_back() -> None:
    flat = FlatArguments.of({"a": [torch.zeros(2), None], "b": (torch.ones(2), 5)})
    rebuilt = flat.rebuild([torch.full((2,), 7.0), torch.full((2,), 8.0)])
    assert rebuilt.kwargs["a"][0][0] == 7 and rebuilt.kwargs["a"][1] is None
    assert rebuilt.kwargs["b"][0][0] == 8 and rebuilt.kwargs["b"][1] == 5


def test_resizing() -> None:
    x = torch.tensor([[1.0, 0.0, -3.0], [float("-inf"), 5.0, 6.0]])
    ids = torch.tensor([3, 4])
    fixed = torch.ones(3)
    flat = FlatArguments.of((x, ids, fixed, torch.tensor(1.0)))
    kept = x.clone()
    large = flat.resized(5)
    values, numbers, same, scalar = large.tensors
    assert values.shape == (5, 3) and numbers.tolist() == [3, 4, 3, 4, 3]
    assert same is fixed and scalar.ndim == 0 and large.batch_size == 5
    assert torch.equal(values[:2], x) and torch.equal(x, kept)
    assert values[2, 1] == 0 and values[3, 0] == float("-inf")
    assert 0.5 <= values[2, 0] < 1 and -3 < values[4, 2] <= -1.5 and values[2, 0] != values[4, 0]
    assert torch.equal(large.example.args[0], values)
    assert torch.equal(flat.resized(1).tensors[0], x[:1])
    assert flat.resized(2) is flat
    assert torch.equal(flat.resized(5, seed=1).tensors[0][:2], x)
    assert not torch.equal(flat.resized(5, seed=1).tensors[0], values)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
def test_bad_batch_sizes(size: Any) -> None:
    with pytest.raises(GraphPruneError, match="batch size: expected an integer of at least 1"):
        FlatArguments.of(torch.ones(2, 3)).resized(size)


@dataclasses.dataclass
class Box:
    tensor: torch.Tensor


def test_inputs_that_cannot_be() -> None:
    with pytest.raises(GraphPruneError, match="cannot be resized"):
        FlatArguments.of(torch.tensor(1.0)).resized(2)
    with pytest.raises(GraphPruneError, match="no tensor"):
        FlatArguments.of({"flag": True})
    with pytest.raises(GraphPruneError, match="batch of 0"):
        FlatArguments.of(torch.ones(0, 3))
    with pytest.raises(GraphPruneError, match="inside an object"):
        FlatArguments.of((Box(torch.ones(1)), torch.ones(1)))
    with pytest.raises(GraphPruneError, match="is empty"):
        FlatArguments.of(())


Pair = namedtuple("Pair", "left right")


def test_output_names() -> None:
    t = [torch.full((1,), float(i)) for i in range(4)]
    cases: list[tuple[Any, list[str]]] = [
        (t[0], ["output"]),
        ((t[0], None, [t[1], 3]), ["output_0", "output_2_0"]),
        ({"a": t[0], "b": {"c": t[1], "d": None}, "e": (t[2],)}, ["a", "b_c", "e_0"]),
        (Pair(t[0], t[1]), ["left", "right"]),
        (Box(t[0]), ["tensor"]),
        ({0: t[0]}, ["output_0"]),
    ]
    for outputs, names in cases:
        found, tensors = named_outputs(outputs)
        assert found == names
        assert [float(x) for x in tensors] == [float(i) for i in range(len(names))]
    assert named_outputs({"x": t[0]}, taken=["x"])[0] == ["x_1"]
    with pytest.raises(GraphPruneError, match="returned no tensor"):
        named_outputs({"a": None, "b": 3})


def test_unique_names() -> None:
    assert unique(["a", "a", "a_1", "b"], taken=["b"]) == ["a", "a_2", "a_1", "b_1"]


def test_signature_of_a_module_that_has_none() -> None:
    assert FlatArguments.of(torch.ones(1, 3, 4, 4), ConvNet()).names == ("x",)
    assert FlatArguments.of(torch.ones(2, 3), nn.Sequential(nn.Linear(3, 3))).names == ("input",)
