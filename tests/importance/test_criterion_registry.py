"""Names, functions and wrong ones: what prune(criterion=...) accepts and how it complains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.dependency.groups import Group
from graphprune.errors import GraphPruneError
from graphprune.importance import Criterion, ImportanceContext, criterion, known_criteria, registry, resolve_criterion
from graphprune.importance.magnitude import lamp

from .reference import every, group, randn

GROUP = group([("conv.weight", 0, every(3), "out")], index=7, name="conv.weight axis 0")


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for table in ("_values", "_origins"):
        monkeypatch.setattr(registry.CRITERIA, table, dict(getattr(registry.CRITERIA, table)))
    yield


def context(weight: torch.Tensor | None = None) -> ImportanceContext:
    return ImportanceContext(nn.Module(), {"conv.weight": randn(3, 2, 3, 3) if weight is None else weight})


def returning(value: Any) -> Criterion:
    def mine(context: ImportanceContext, group: Group) -> Any:
        return value

    return resolve_criterion(mine)


def test_the_built_in_names() -> None:
    assert set(known_criteria()) >= {"l1", "l2", "bn_scale", "fpgm", "lamp", "random"}
    assert {name for name in known_criteria() if resolve_criterion(name).comparable} >= {"lamp", "bn_scale", "random"}
    assert not resolve_criterion("l2").comparable


@pytest.mark.parametrize(("name", "near"), [("L2", "l2"), ("lmap", "lamp"), ("bn", "bn_scale"), ("FPGN", "fpgm")])
def test_unknown_names_get_the_nearest_and_the_list(name: str, near: str) -> None:
    with pytest.raises(GraphPruneError) as caught:
        resolve_criterion(name)
    message = str(caught.value)
    assert f"unknown criterion '{name}'" in message and f"did you mean '{near}'?" in message
    assert all(known in message for known in known_criteria())


def test_nothing_near_no_guess() -> None:
    with pytest.raises(GraphPruneError) as caught:
        resolve_criterion("xyzzy")
    assert "did you mean" not in str(caught.value)


def test_a_decorated_function_is_found_by_name_and_by_itself(scratch: None) -> None:
    @criterion("largest", comparable=True)
    def largest(context: ImportanceContext, group: Group) -> torch.Tensor:
        return context.weights(group)[0].abs().amax(1)

    found = resolve_criterion("largest")
    assert found is resolve_criterion(largest) and found is resolve_criterion(found)
    assert found.name == "largest" and found.comparable and "largest" in known_criteria()
    weight = nn.Parameter(randn(3, 2, 3, 3))
    np.testing.assert_allclose(found(context(weight), GROUP), weight.detach().abs().amax((1, 2, 3)))
    assert resolve_criterion(lamp).name == "lamp"


def test_a_name_can_be_redefined_only_by_the_same_function(scratch: None) -> None:
    def define() -> None:
        @criterion("mine")
        def mine(context: ImportanceContext, group: Group) -> list[int]:
            return [1] * group.size

    define()
    define()
    with pytest.raises(GraphPruneError, match="'mine' is already registered by"):

        @criterion("mine")
        def other(context: ImportanceContext, group: Group) -> list[int]:
            return [1] * group.size

    with pytest.raises(GraphPruneError, match="expected a name"):
        criterion(lamp)  # the decorator without its name


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        (torch.tensor(1.0), 2.0, 3),
        np.array([1, 2, 3], dtype=np.int8),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_any_array_like_will_do(value: Any) -> None:
    scores = returning(value)(context(), GROUP)
    assert scores.dtype == np.float64 and scores.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([1.0, 2.0], r"returned shape \(2,\) for group 7 \(conv\.weight axis 0, 3 units\): expected \(3,\)"),
        (torch.ones(3, 1), r"returned shape \(3, 1\)"),
        (1.0, r"returned shape \(\)"),
        (None, "returned nothing"),
        ("abc", "returned str"),
        (torch.ones(3, dtype=torch.complex64), "returned Tensor"),
        (torch.ones(3, device="meta"), "meta device"),
        ([1.0, float("nan"), float("inf")], "gave 2 NaN or infinite scores .* the weights are finite"),
    ],
)
def test_wrong_results_name_the_criterion_and_the_group(value: Any, complaint: str) -> None:
    with pytest.raises(GraphPruneError, match=complaint):
        returning(value)(context(), GROUP)


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(name: str, value: float) -> None:
    weight = randn(3, 2, 3, 3)
    weight[1, 0, 2, 1] = value
    with pytest.raises(GraphPruneError) as caught:
        resolve_criterion(name)(context(weight), GROUP)
    message = str(caught.value)
    assert f"criterion '{name}'" in message and "group 7" in message and "in 'conv.weight'" in message


def test_no_gradients_are_recorded() -> None:
    def squares(context: ImportanceContext, group: Group) -> torch.Tensor:
        scores = context.tensors["conv.weight"].square().sum((1, 2, 3))
        assert not scores.requires_grad
        return scores

    assert resolve_criterion(squares)(context(nn.Parameter(randn(3, 2, 3, 3))), GROUP).all()


def test_errors_inside_a_criterion_say_where() -> None:
    def broken(context: ImportanceContext, group: Group) -> Any:
        return context.tensors["conv.wieght"]

    with pytest.raises(GraphPruneError, match=r"'broken' failed on group 7 .*KeyError: 'conv\.wieght'") as caught:
        resolve_criterion(broken)(context(), GROUP)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_is_no_criterion() -> None:
    with pytest.raises(GraphPruneError, match="got int"):
        resolve_criterion(3)
    with pytest.raises(GraphPruneError, match="got the class Linear; pass an instance"):
        resolve_criterion(nn.Linear)


def test_torch_pruning_is_not_imported_for_nothing() -> None:
    code = (
        "import sys; from graphprune.importance import resolve_criterion; resolve_criterion('l2'); "
        "resolve_criterion(lambda context, group: [1]); assert 'torch_pruning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
