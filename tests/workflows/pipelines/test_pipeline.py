"""The whole way against the same steps made one by one, and stopped runs against whole ones, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import Budget, GraphPruneError, PipelineResult, sparsity
from graphprune.planning.allocation.rounding import nearest

X = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long() + 2 * (X[:, 0].mean((1, 2)) > 0).long()
HELD_OUT = [(X, Y)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.drop, self.fc = nn.Conv2d(12, 8, 3), nn.Dropout(0.1), nn.Linear(8, 4)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(F.relu(self.second(F.relu(self.norm(self.first(x))))))
        out: Tensor = self.fc(self.drop(hidden.mean((2, 3))))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 16, shuffle=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Killed(BaseException):
    pass


class Killing:
    """A loader that is killed before the given batch of all that it hands out."""

    def __init__(self, at: int) -> None:
        self.data, self.left = loader(), at

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            self.left -= 1
            if self.left < 0:
                raise Killed
            yield item


WAYS: dict[str, dict[str, Any]] = {
    "channels at once": {"distillation": True},
    "channels gradually": {"schedule": "cubic", "prune_epochs": 3, "optimizer": "adamw"},
    "channels by taylor": {"schedule": "linear", "prune_epochs": 2, "options": {"criterion": "taylor"}},
    "channels with least squares": {"recover": "least_squares", "budget": Budget(macs=0.5), "calibration": HELD_OUT},
    "layers": {"method": "layers", "sparsity": 0.5, "calibration": HELD_OUT, "optimizer": "adamw"},
    "magnitude at once": {"method": "magnitude", "sparsity": 0.8},
    "magnitude gradually": {"method": "magnitude", "schedule": "zhu-gupta", "prune_epochs": 3, "sparsity": 0.9},
    "gradient gradually": {"method": "gradient", "schedule": "linear", "prune_epochs": 2},
}


def run(data: Any, way: dict[str, Any], **more: Any) -> PipelineResult:
    options: dict[str, Any] = {"train_epochs": 1, "finetune_epochs": 2, "evaluate": HELD_OUT, "progress": False}
    return graphprune.pipeline(net(), X[:2], data, **{**options, **way, **more})


@pytest.mark.parametrize("name", WAYS)
def test_repeats_itself_and_resumes_to_the_same_result_after_a_kill_at_any_batch(name: str, tmp_path: Path) -> None:
    way = {**WAYS[name], "patience": 4}
    whole = run(loader(), way)
    torch.rand(5)
    assert run(loader(), way).to_dict() == whole.to_dict()

    def finished(at: int, folder: Path | None) -> PipelineResult | None:
        try:
            return run(Killing(at), way, checkpoint=folder)
        except Killed:
            return None

    at = 0
    while (found := finished(at, tmp_path / str(at))) is None:
        torch.rand(at + 1)
        again = run(loader(), way, checkpoint=tmp_path / str(at))
        assert same(again.model, whole.model) and same(again.dense, whole.dense), at
        assert again.to_dict() == whole.to_dict(), at
        assert [p.to_dict() for p in again.plans] == [p.to_dict() for p in whole.plans]
        at += 2 if at > 4 else 1
    assert at >= 8 and same(found.model, whole.model)  # at least three epochs of three batches


def test_one_shot_is_finetune_prune_finetune() -> None:
    model, data = net(), loader()
    got = graphprune.pipeline(model, X[:2], data, 0.5, train_epochs=2, finetune_epochs=2, evaluate=HELD_OUT, lr=0.05)
    dense = graphprune.finetune(net(), data, epochs=2).model
    plan = graphprune.plan(dense, X[:2], 0.5, fold_bn=False)
    cut = plan.apply(dense)
    small = graphprune.finetune(cut, data, epochs=2, lr=0.05).model
    assert same(got.dense, dense) and same(got.model, small)
    assert [p.removed for p in got.plans] == [plan.removed]
    score = graphprune.Evaluation(HELD_OUT)
    wanted = {"before": score(dense), "after pruning": score(cut), "after recovery": score(small)}
    assert got.report.scores == wanted and got.report.metric == "top-1 accuracy"
    assert [(s.epoch, s.sparsity, s.score) for s in got.steps] == [(1, 0.5, score(cut))]
    assert same(model, net()) and not got.model.training
    assert got.report.after.parameters == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", ["linear", "exponential", "sinusoidal"])
def test_gradual_masks_are_at_target_after_every_epoch(name: str) -> None:
    seen: list[int] = []
    total = 12 * 27 + 8 * 12 * 9 + 32 + 4 * 48

    def look(epoch: graphprune.recovery.Epoch, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        seen.append(sum(int((m.weight == 0).sum()) for m in layers))

    got = graphprune.pipeline(
        net(), X[:2], loader(), 0.9, method="magnitude", schedule=name, prune_epochs=4, finetune_epochs=2, on_epoch=look
    )
    curve = sparsity.schedule(name, 0.0, 0.9, 4)
    assert seen == [nearest(curve(min(k, 4)) * total) for k in range(1, 7)]
    assert not sparsity.masks(got.model) and got.report.after.parameters - got.report.after.nonzero == seen[-1]
    assert [s.sparsity for s in got.steps] == [curve(k) for k in range(1, 5)] and not got.plans


def test_gradual_channels_are_at_target_and_the_plans_lead_there() -> None:
    widths: list[tuple[int, int]] = []
    got = graphprune.pipeline(
        net(), X[:2], loader(), 0.5, schedule="linear", prune_epochs=2, finetune_epochs=1,
        on_epoch=lambda e, m: widths.append((m.first.out_channels, m.second.out_channels)),  # type: ignore[union-attr, arg-type]
    )  # fmt: skip
    assert widths == [(9, 6), (6, 4), (6, 4)]
    model = got.dense
    for plan in got.plans:
        model = plan.apply(model)
    assert [tuple(t.shape) for t in model.state_dict().values()] == [
        tuple(t.shape) for t in got.model.state_dict().values()
    ]


def test_budget_and_recovery_without_training() -> None:
    got = graphprune.pipeline(
        net(), X[:2], loader(), budget=Budget(macs=0.6), recover="least_squares", calibration=HELD_OUT, train_epochs=2,
        finetune_epochs=0, evaluate=HELD_OUT,
    )  # fmt: skip
    plan = graphprune.plan(got.dense, X[:2], budget=Budget(macs=0.6), fold_bn=False)
    wanted = graphprune.recover(got.dense, plan, X[:2], HELD_OUT).model
    assert same(got.model, wanted) and 0.5 < got.report.after.macs / got.report.before.macs <= 0.6
    assert set(got.report.scores) == {"before", "after pruning"}


def test_layers_are_left_out() -> None:
    got = graphprune.pipeline(net(), X[:2], loader(), 0.5, method="layers", finetune_epochs=1)
    (plan,) = got.plans
    assert plan.layers == graphprune.plan(net(), X[:2], 0.5, granularity="layer", data=loader()).layers
    assert len(got.model.blocks) == 1 and got.report.after.macs < got.report.before.macs  # type: ignore[arg-type]
    names = {layer.name: (layer.parameters_before, layer.parameters_after) for layer in got.report.layers}
    assert names["blocks.1.up"] == (54, 0)


def test_own_methods() -> None:
    def in_place(model: nn.Module, amount: float) -> nn.Module:
        return sparsity.n_m(model, 2, 4, ignore=["first"])

    got = graphprune.pipeline(net(), X[:2], loader(), 0.5, method=in_place, finetune_epochs=1)
    rows = got.model.second.weight.flatten(1)  # type: ignore[union-attr, operator]
    assert got.report.after.sparsity > 0.3 and (rows != 0).any()
    with pytest.raises(GraphPruneError, match="no plan"):
        graphprune.pipeline(net(), X[:2], loader(), 0.5, method=lambda m, s: copy.deepcopy(m), finetune_epochs=1)
    with pytest.raises(GraphPruneError, match="return the model"):
        graphprune.pipeline(net(), X[:2], loader(), 0.5, method=lambda m, s: 3, finetune_epochs=1)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"method": "channel"}, "method"),
        ({"schedule": "cubical"}, "cubic"),
        ({"prune_epochs": 3}, "one-shot"),
        ({"schedule": "cubic", "prune_epochs": 0}, "prune_epochs"),
        ({"finetune_epochs": -1}, "epochs"),
        ({"budget": Budget(macs=0.5), "sparsity": 0.5}, "exclude"),
        ({"budget": Budget(macs=0.5), "schedule": "cubic"}, "at once"),
        ({"budget": Budget(macs=0.5), "method": "magnitude"}, "budget"),
        ({"budget": 0.5}, "Budget"),
        ({"options": {"critrion": "l1"}}, "critrion"),
        ({"method": "magnitude", "options": {"scop": "layer"}}, "scop"),
        ({"method": lambda m, s: m, "options": {"scope": "layer"}}, "options"),
        ({"recover": "most squares"}, "recover"),
        ({"patience": 2}, "evaluate"),
        ({"distillation": 3}, "distillation"),
        ({"method": "layers", "schedule": "cubic"}, "layers"),
        ({"method": "layers", "recover": "mean"}, "layers"),
        ({"checkpoint": "/proc/no/such"}, "checkpoint"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    model = net()
    with pytest.raises(GraphPruneError, match=text):
        graphprune.pipeline(model, X[:2], loader(), **options)
    assert same(model, net())


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    graphprune.pipeline(net(), X[:2], loader(), 0.5, finetune_epochs=1, checkpoint=tmp_path)
    for options, text in (
        ({"sparsity": 0.25}, "sparsity"),
        ({"method": "magnitude"}, "method"),
        ({"options": {"criterion": "l1"}}, "options"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(GraphPruneError, match=text):
            graphprune.pipeline(net(), X[:2], loader(), finetune_epochs=1, checkpoint=tmp_path, **options)  # type: ignore[arg-type]
