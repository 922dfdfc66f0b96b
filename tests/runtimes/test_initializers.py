from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.runtimes.initializers import check_file, planned_shapes
from tests.runtimes.nets import Attention, ConvNet


def plan(removed: Any, **more: Any) -> Any:
    return SimpleNamespace(removed=removed, **more)


def test_shapes_of_a_plan() -> None:
    model = ConvNet(width=5)
    removed = {"conv1.weight": {0: [0, 2, 7]}, "bn1.running_mean": {0: [0, 2, 7]}, "conv2.weight": {1: [0, 2, 7]}}
    expected = {"conv1.weight": (5, 3, 3, 3), "bn1.running_mean": (5,), "conv2.weight": (6, 5, 3, 3)}
    assert planned_shapes(model, plan(removed)) == expected
    before = {"conv1.weight": (8, 3, 3, 3), "bn1.running_mean": (8,), "conv2.weight": (6, 8, 3, 3)}
    assert planned_shapes(model, plan(removed, structure=before | {"fc.bias": (4,)})) == {**expected, "fc.bias": (4,)}
    # Folded away, so the model has no such parameter any more.
    assert planned_shapes(model, plan({"bn9.weight": {0: [1]}})) == {}


def test_a_plan_of_another_model() -> None:
    removed = {"conv1.weight": {0: [0, 2, 7]}}
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' has shape \(8, 3, 3, 3\).*leaves \(5, 3, 3, 3\)"):
        planned_shapes(ConvNet(width=8), plan(removed, structure={"conv1.weight": (8, 3, 3, 3)}))
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' of shape \(4, 3, 3, 3\) cannot come from removing 3"):
        planned_shapes(ConvNet(width=4), plan(removed))
    with pytest.raises(GraphPruneError, match=r"'fc.bias' has shape \(4,\) in the model, but the plan leaves \(7,\)"):
        planned_shapes(ConvNet(), plan({}, structure={"fc.bias": (7,)}))
    with pytest.raises(GraphPruneError, match="cannot come from"):
        planned_shapes(ConvNet(), plan({"fc.bias": {1: [0]}}))
    with pytest.raises(GraphPruneError, match=r"expected what graphprune.plan returns, got dict"):
        planned_shapes(ConvNet(), {"removed": 1})  # type: ignore[arg-type]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_where_parameters_are_found() -> None:
    model = Attention()
    found = shapes(model)
    used = set(found)
    assert check_file(found, model, used, {}).exact == tuple(found)
    del found["layer.linear1.weight"], found["layer.linear2.weight"], found["first.weight"], found["second.bias"]
    found |= {"val_1": (8, 16), "val_2": (8, 8), "val_3": (7,)}
    result = check_file(found, model, used - {"second.bias"}, {})
    assert set(result.transposed) == {"layer.linear1.weight", "first.weight"}
    # One initializer stands for one parameter, not for two of the same shape.
    assert result.folded == ("layer.linear2.weight",)
    assert result.unused == ("second.bias",)
    assert "layer.self_attn.in_proj_weight" in result.exact


def test_a_tied_weight_is_found_under_its_other_name() -> None:
    model = Attention()
    found = shapes(model)
    found["second.weight"] = found.pop("first.weight")
    result = check_file(found, model, set(found), {})
    assert "first.weight" in result.exact and not result.folded


def test_wrong_shapes() -> None:
    model = ConvNet()
    found = shapes(model) | {"conv1.weight": (7, 3, 3, 3)}
    with pytest.raises(GraphPruneError, match=r"'conv1.weight' has shape \(7, 3, 3, 3\).*model has \(8, 3, 3, 3\)"):
        check_file(found, model, set(found), {})
    with pytest.raises(GraphPruneError, match=r"plan leaves \(6, 3, 3, 3\)"):
        check_file(shapes(model), model, set(found), {"conv1.weight": (6, 3, 3, 3)})
    with pytest.raises(GraphPruneError, match=r"'bn1.running_mean'"):
        check_file({"bn1.running_mean": (9,)}, model, set(found), {})
    permuted = check_file(shapes(model) | {"fc.weight": (6, 4)}, model, set(found), {})
    assert "fc.weight" in permuted.transposed


def test_tensors_are_not_touched() -> None:
    model = ConvNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned_shapes(model, plan({"conv1.weight": {0: []}}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
