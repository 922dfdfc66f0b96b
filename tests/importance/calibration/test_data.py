"""What `data` may be, and what is said about the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphprune import GraphPruneError
from graphprune.importance.calibration import CalibrationData
from graphprune.importance.calibration.data import refuse_infinite
from graphprune.tracing.example import ExampleInput

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
ONE = ExampleInput.of(X[:1])
TWO = ExampleInput.of((X[:1], X[:1]))


def read(data: Any, example: ExampleInput = ONE) -> list[tuple[ExampleInput, Any]]:
    return list(CalibrationData(data, example, nn.Linear(2, 1)))


@pytest.mark.parametrize(
    "data",
    [
        [X[:4], X[4:]],
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        DataLoader(TensorDataset(X), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [((X[:4],), Y[:4]), ((X[4:],), Y[4:])],
    ],
)
def test_inputs_come_out_alike(data: Any) -> None:
    got = torch.cat([inputs.args[0] for inputs, _ in read(data)])
    assert torch.equal(got, X)


def test_targets() -> None:
    assert [t.tolist() for _, t in read([(X[:4], Y[:4]), (X[4:], Y[4:])])] == [[0, 1, 2, 3], [4, 5]]
    assert [t for _, t in read([X, {"input": X}])] == [None, None]


def test_a_tensor_is_read_in_batches() -> None:
    assert [len(i.args[0]) for i, _ in read(torch.zeros(130, 2))] == [64, 64, 2]


def test_two_positional_arguments_are_no_targets() -> None:
    ((inputs, targets),) = read([(X, X + 1)], TWO)
    assert len(inputs.args) == 2 and targets is None
    ((inputs, targets),) = read([((X, X + 1), Y)], TWO)
    assert len(inputs.args) == 2 and torch.equal(targets, Y)


def test_keyword_arguments() -> None:
    ((inputs, targets),) = read([({"input": X}, Y)])
    assert torch.equal(inputs.kwargs["input"], X) and torch.equal(targets, Y)


def test_several_passes_read_the_same() -> None:
    data = CalibrationData([X], ONE, nn.Linear(2, 1))
    assert len(list(data)) == len(list(data)) == 1


def test_data_that_end_with_the_first_pass_say_so() -> None:
    class Once:
        def __init__(self) -> None:
            self.items = iter([X, X])

        def __iter__(self) -> Iterator[Tensor]:
            return self.items

    data = CalibrationData(Once(), ONE, nn.Linear(2, 1))
    assert len(list(data)) == 2
    with pytest.raises(GraphPruneError, match="yields no batch when it is read again, after 2 the first time"):
        list(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([X]), "read only once"),
        ((x for x in [X]), "read only once"),
        (3, "expected a DataLoader"),
        (X.sum(), "expected a DataLoader"),
        ({"x": X}, "expected a DataLoader"),
        ([], "yields no batch"),
        ([X, X[:0]], "batch 1 holds no samples"),
        ([3], "batch 0 is a int"),
        ([X, (X, X, X)], "batch 1 is a tuple of length 3"),
        ([(3, Y)], "batch 0"),
    ],
)
def test_errors_name_data(data: Any, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("data:")


def test_finite_values_may_have_sums_that_are_not() -> None:
    large = torch.full((4,), 3e38)
    refuse_infinite(large, "it holds")
    refuse_infinite(torch.tensor([1.0, -math.inf]), "it holds", nan_alone=True)
    for wrong, count in (([math.inf, -math.inf, 1.0], 2), ([math.nan, 1.0], 1)):
        with pytest.raises(GraphPruneError, match=f"it holds {count} NaN or infinite"):
            refuse_infinite(torch.tensor(wrong), "it holds")
    with pytest.raises(GraphPruneError, match="it holds 1 NaN in"):
        refuse_infinite(torch.tensor([math.nan, math.inf]), "it holds", nan_alone=True)
