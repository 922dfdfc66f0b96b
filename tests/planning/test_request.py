"""plan, prune and verify on textbook networks: literal expectations, bad input, tampering, plan files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from graphprune import GraphPruneError, Plan
from tests.oracles import relative_error


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 6, 3, padding=1, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(x).mean((2, 3)))


def small() -> tuple[Small, torch.Tensor]:
    torch.manual_seed(0)
    model = Small().eval()
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.bn1.weight)
    nn.init.normal_(model.bn1.bias)
    return model, torch.randn(2, 3, 8, 8)


def test_rounds_to_nearest_and_keeps_the_strongest_filters() -> None:
    model, x = small()
    scale = model.bn1.weight.detach() / torch.sqrt(model.bn1.running_var + model.bn1.eps)
    for criterion, factor in (("l2_folded", scale), ("l2", torch.ones(10))):
        plan = graphprune.plan(model, x, 0.34, fold_bn=False, criterion=criterion, round_to=1)
        removed = plan.removed["conv1.weight"][0]
        assert len(removed) == 3
        norms = (model.conv1.weight.detach() * factor.view(-1, 1, 1, 1)).flatten(1).norm(dim=1)
        assert set(removed) == set(norms.argsort()[:3].tolist())
    assert plan.removed["conv2.weight"][1] == plan.removed["bn1.running_mean"][0] == removed
    pruned = plan.apply(model)
    kept = [i for i in range(10) if i not in removed]
    assert torch.equal(pruned.conv2.weight, model.conv2.weight[[*range(6)]][:, kept][_kept(plan, "conv2.weight", 0, 6)])
    assert (pruned.conv1.out_channels, pruned.bn1.num_features, pruned.conv2.in_channels) == (7, 7, 7)


def _kept(plan: Plan, name: str, axis: int, length: int) -> list[int]:
    return [i for i in range(length) if i not in plan.removed.get(name, {}).get(axis, ())]


def test_ties_keep_the_lower_index() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.ones_(net[0].weight)
    nn.init.ones_(net[2].weight)
    for criterion in (None, "l2"):
        plan = graphprune.plan(net, torch.randn(1, 4), 0.5, criterion=criterion)
        assert plan.removed["0.weight"][0] == (3, 4, 5)


def test_the_model_is_not_touched_and_pruning_twice_works() -> None:
    model, x = small()
    before = copy.deepcopy(model.state_dict())
    once = graphprune.prune(model, x, 0.5, round_to=1)
    twice = graphprune.prune(once, x, 0.5, round_to=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (once.conv1.out_channels, twice.conv1.out_channels) == (5, 2)


def test_a_plan_survives_its_file_and_refuses_another_model(tmp_path: Path) -> None:
    model, x = small()
    plan = graphprune.plan(model, x, 0.5)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.to_dict() == plan.to_dict()
    assert relative_error(loaded.apply(model)(x), plan.apply(model)(x)) == 0
    with pytest.raises(GraphPruneError, match="another model"):
        loaded.apply(nn.Linear(3, 3))
    with pytest.raises(GraphPruneError, match="cannot write"):
        plan.save(tmp_path / "missing" / "plan.json")


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "x"}', '{"format": "graphprune.plan/1"}'])
def test_damaged_plan_files_are_errors(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(damage)
    with pytest.raises(GraphPruneError):
        Plan.load(path)


@pytest.mark.parametrize("indices", [[3, 3], [2, 1], [-1], [10], list(range(10))])
def test_edited_plans_with_bad_indices_are_errors(indices: list[int]) -> None:
    model, x = small()
    data = json.loads(json.dumps(graphprune.plan(model, x, 0.5).to_dict()))
    data["removed"]["conv1.weight"]["0"] = indices
    with pytest.raises(GraphPruneError):
        Plan.from_dict(data)


def test_verify_notices_one_wrong_weight_and_swapped_channels() -> None:
    model, x = small()
    plan = graphprune.plan(model, x, 0.5)
    assert graphprune.verify(model, plan.apply(model), plan, x).passed
    with torch.no_grad():
        wrong = plan.apply(model)
        wrong.conv2.weight[0, 0, 1, 1] += 0.5
        swapped = plan.apply(model)
        swapped.conv1.weight[:2] = swapped.conv1.weight[:2].flip(0)
    for broken in (wrong, swapped):
        report = graphprune.verify(model, broken, plan, x)
        assert not report.passed
        with pytest.raises(GraphPruneError, match="verification failed"):
            report.raise_on_failure()


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), "half", True])
def test_ratio_out_of_range(ratio: object) -> None:
    model, x = small()
    with pytest.raises(GraphPruneError, match="ratio"):
        graphprune.plan(model, x, ratio)  # type: ignore[arg-type]


def test_unknown_names_are_named() -> None:
    model, x = small()
    with pytest.raises(GraphPruneError, match="conv1"):
        graphprune.plan(model, x, 0.5, ignore=["conv11"])
    with pytest.raises(GraphPruneError, match="nothing_like_it"):
        graphprune.plan(model, x, {"nothing_like_it": 0.5})


def test_wrong_example_input_shows_the_models_error_and_line() -> None:
    model, _ = small()
    with pytest.raises(GraphPruneError, match=r"test_request\.py:\d+ in forward"):
        graphprune.plan(model, torch.randn(2, 4, 8, 8))
    with pytest.raises(GraphPruneError, match="empty"):
        graphprune.plan(model, ())


def test_nan_weights_are_named() -> None:
    model, x = small()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(GraphPruneError, match=r"conv2\.weight"):
        graphprune.plan(model, x, 0.5)


def test_a_ratio_that_would_empty_a_group_keeps_one() -> None:
    model, x = small()
    assert graphprune.prune(model, x, 0.99).conv1.out_channels == 1
    assert graphprune.prune(model, x, 0.99, min_channels=3).conv1.out_channels == 3


def test_nothing_prunable_says_why() -> None:
    plan = graphprune.plan(nn.Sequential(nn.Linear(3, 4)), torch.randn(1, 3), 0.5)
    assert plan.empty
    assert any("output" in line for line in plan.frozen) and any("input" in line for line in plan.frozen)


def test_ratios_by_pattern_the_longest_wins() -> None:
    model, x = small()
    pruned = graphprune.prune(model, x, {"*": 0.5, "conv1": 0.2})
    assert (pruned.conv1.out_channels, pruned.conv2.out_channels) == (8, 3)


def test_explanations_name_the_line_of_the_source() -> None:
    model, x = small()
    text = graphprune.trace(model, x).explain("fc.weight")
    assert "model's output" in text and "conv2.weight[0]" in text
    with pytest.raises(GraphPruneError, match="no parameter"):
        graphprune.trace(model, x).explain("fc.wheight")
