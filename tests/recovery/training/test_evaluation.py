"""Metrics over held-out data against loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import Evaluation, GraphPruneError
from graphprune.recovery.training.evaluation import evaluator, metric_name


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.9), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()


class Largest:
    """The largest logit of all, in the interface of torchmetrics."""

    def __init__(self) -> None:
        self.values: list[float] = [99.0]

    def reset(self) -> None:
        self.values = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.values += logits.max(1).values.tolist()

    def compute(self) -> Tensor:
        return torch.tensor(max(self.values))


def test_top_1_counts_items_and_leaves_the_model_alone() -> None:
    model, x, y = net(), torch.randn(23, 5), torch.randint(0, 4, (23,))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    got = Evaluation(DataLoader(TensorDataset(x, y), 5))(model)  # batches of 5 and one of 3
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    logits = model.eval()(x).tolist()
    assert got == sum(row.index(max(row)) == int(t) for row, t in zip(logits, y, strict=True)) / 23


def test_places_count_each() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    right = sum(
        max(range(3), key=lambda c: float(x[i, c, j, k])) == int(y[i, j, k])
        for i in range(2) for j in range(4) for k in range(4)
    )  # fmt: skip
    assert Evaluation([(x, y)])(nn.Identity()) == right / 32


def test_metrics_of_other_libraries() -> None:
    model, batches = net().eval(), [(torch.randn(6, 5), torch.zeros(6)) for _ in range(2)]
    evaluation = Evaluation(batches, Largest())
    with torch.no_grad():
        want = max(float(model(x).max()) for x, _ in batches)
    assert evaluation(model) == evaluation(model) == pytest.approx(want)
    assert metric_name(evaluation) == "Largest" and metric_name(Evaluation(batches, Largest(), "top")) == "top"
    done = graphprune.finetune(model, [(x, y.long()) for x, y in batches], epochs=1, evaluate=evaluation)
    assert done.score is not None and done.before == pytest.approx(want)


def test_functions_see_the_model_in_eval_mode() -> None:
    seen: list[Any] = []

    def look(model: nn.Module) -> Tensor:
        seen.append((model.training, torch.is_grad_enabled()))
        return torch.tensor(0.25)

    ask = evaluator(look)
    assert ask is not None and ask(net()) == 0.25 and seen == [(False, False)] and evaluator(None) is None
    assert metric_name(look) == "look" and metric_name([1]) == "top-1 accuracy"


def test_what_does_not_fit_is_named() -> None:
    x = torch.randn(6, 5)
    short = torch.zeros(5).long()
    for data, text in (([x], "no targets"), ([(x, torch.zeros(6))], "class numbers"), ([(x, short)], "fit")):
        with pytest.raises(GraphPruneError, match=text):
            Evaluation(data)(net())
    with pytest.raises(GraphPruneError, match="compute"):
        Evaluation([(x, x)], nn.CrossEntropyLoss())
