"""Losses against loops over items, classes and places."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune import Distillation, GraphPruneError
from graphprune.recovery.training.distillation import feature_distance, logit_distance
from graphprune.recovery.training.objective import Objective
from graphprune.tracing.example import ExampleInput


def _softmax(values: list[float], temperature: float) -> list[float]:
    top = max(values)
    parts = [math.exp((v - top) / temperature) for v in values]
    return [p / sum(parts) for p in parts]


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("places", [(), (2, 3)])
def test_logits(temperature: float, places: tuple[int, ...]) -> None:
    own, wanted = torch.randn(5, 7, *places), 3 * torch.randn(5, 7, *places)
    rows = zip(own.movedim(1, -1).reshape(-1, 7).tolist(), wanted.movedim(1, -1).reshape(-1, 7).tolist(), strict=True)
    parts = []
    for a, b in rows:
        p, q = _softmax(a, temperature), _softmax(b, temperature)
        parts.append(sum(y * (math.log(y) - math.log(x)) for x, y in zip(p, q, strict=True)))
    want = temperature**2 * sum(parts) / len(parts)
    assert float(logit_distance(own, wanted, temperature)) == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert float(logit_distance(own, own, temperature)) == pytest.approx(0, abs=1e-5)


def test_similarities_of_other_widths() -> None:
    own, wanted = torch.randn(4, 3, 2, 2), torch.randn(4, 9)
    grams = []
    for features in (own, wanted):
        gram = [[float((a * b).sum()) for b in features] for a in features]
        grams.append([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in gram])
    want = sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert float(feature_distance(own, wanted, "similarity", "x")) == pytest.approx(want, rel=1e-4)


def test_attention_maps_of_other_widths() -> None:
    own, wanted = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    total = 0.0
    for i in range(2):
        maps = []
        for features in (own[i], wanted[i]):
            means = [float(sum(c[y, x] ** 2 for c in features) / len(features)) for y in range(2) for x in range(2)]
            size = math.sqrt(sum(m * m for m in means))
            maps.append([m / size for m in means])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    assert float(feature_distance(own, wanted, "attention", "x")) == pytest.approx(total / 8, rel=1e-4)


def test_mean_squares() -> None:
    own, wanted = torch.randn(3, 4), torch.randn(3, 4)
    want = float(((own - wanted) ** 2).mean() / (wanted**2).mean())
    assert float(feature_distance(own, wanted, "mse", "x")) == pytest.approx(want, rel=1e-5)


def _nets() -> tuple[nn.Sequential, nn.Sequential]:
    return (
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).train(),
    )


@pytest.mark.parametrize("targets", [True, False])
def test_the_parts_are_added_as_written(targets: bool) -> None:
    student, teacher = _nets()
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,)) if targets else None
    settings = Distillation(2.0, 0.3, ["0", "1"], feature_weight=7.0)  # type: ignore[arg-type]
    objective = Objective(None, teacher, settings)
    state = copy.deepcopy(teacher.state_dict())
    with objective.watching(student):
        got = objective(student, ExampleInput.of(x), y)
    logits = logit_distance(student(x), teacher(x), 2.0)
    features = sum(
        feature_distance(student[:i](x), teacher[:i](x), "similarity", "x") for i in (1, 2)
    )
    want = logits if y is None else 0.3 * logits + 0.7 * F.cross_entropy(student(x), y)
    torch.testing.assert_close(got, want + 7.0 * features / 2)
    got.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and teacher.training
    assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


def test_a_student_without_labels_comes_near_its_teacher() -> None:
    student, teacher = _nets()
    data = [torch.randn(32, 6) for _ in range(20)]
    settings = Distillation(1.0, features=("0",))
    done = graphprune.finetune(
        student, data, epochs=10, optimizer="adam", lr=0.03, teacher=teacher, distillation=settings
    )
    x = torch.randn(100, 6)
    with torch.no_grad():
        before, after = (float(logit_distance(net(x), teacher(x), 1.0)) for net in (student, done.model))
    assert after < 0.1 * before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"weight": 1.1}, "weight"),
        ({"weight": True}, "weight"),
        ({"feature_weight": -1}, "feature_weight"),
        ({"features": "layer1"}, "features"),
        ({"feature_loss": "l1"}, "feature_loss"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphPruneError, match=text):
        Distillation(**options)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Distillation(features=("9",)), "no module '9'"),
        (Distillation(features=("0",), feature_loss="mse"), "equal shapes"),
        (Distillation(features=("0",), feature_loss="attention"), "attention"),
    ],
)
def test_features_that_do_not_fit_are_named(settings: Distillation, text: str) -> None:
    student, teacher = _nets()
    with pytest.raises(GraphPruneError, match=text):
        graphprune.finetune(student, [torch.randn(4, 6)], epochs=1, teacher=teacher, distillation=settings)
    other = nn.Linear(6, 4)
    with pytest.raises(GraphPruneError, match="same question"):
        graphprune.finetune(student, [torch.randn(4, 6)], epochs=1, teacher=other)


def test_a_module_that_does_not_run_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    settings = Distillation(features=("idle",))
    with pytest.raises(GraphPruneError, match="does not run"):
        graphprune.finetune(Idle(), [torch.randn(4, 6)], epochs=1, teacher=Idle(), distillation=settings)
