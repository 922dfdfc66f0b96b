"""The loop against one written out plainly, and stopped runs against whole ones, bit for bit."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.recovery.training.loop import rate_factor
from graphprune.support.randomness import seed_epoch

X = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2, 3)) > 0).long() + 2 * (X[:, 0].mean((1, 2)) > 0).long()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))
        return out


def loader(generator: torch.Generator | None = None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Killed(BaseException):
    pass


class Killing:
    """A loader that is killed before the given batch of all that it hands out."""

    def __init__(self, data: Any, at: int) -> None:
        self.data, self.left = data, at

    def __len__(self) -> int:
        return len(self.data)

    @property
    def generator(self) -> Any:
        return self.data.generator

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            self.left -= 1
            if self.left < 0:
                raise Killed
            yield item


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_is_the_plain_loop(kind: str) -> None:
    epochs, lr, clip = 3, 0.05, 0.5
    got = graphprune.finetune(net(), loader(), epochs=epochs, optimizer=kind, lr=lr, clip=clip, warmup=0.25, seed=5)

    want = net().train()
    data = loader()
    made: torch.optim.Optimizer
    if kind == "sgd":
        made = torch.optim.SGD(want.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    else:
        made = torch.optim.AdamW(want.parameters(), lr, weight_decay=5e-4)
    step, losses = 0, []
    for epoch in range(epochs):
        seed_epoch(5, epoch)
        for x, y in data:
            rise, steps = round(0.25 * 9), 9
            factor = (step + 1) / (rise + 1) if step < rise else 0.5 + 0.5 * math.cos(
                math.pi * (step - rise) / (steps - rise)
            )
            made.param_groups[0]["lr"] = lr * factor
            loss = F.cross_entropy(want(x), y)
            made.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in want.parameters() if p.grad is not None))
            for p in want.parameters():
                assert p.grad is not None
                p.grad.mul_(min(1.0, clip / (norm + 1e-6)))
            made.step()
            losses.append(loss.item())
            step += 1
    torch.testing.assert_close(dict(got.model.state_dict()), dict(want.state_dict()), rtol=1e-4, atol=1e-5)
    assert [e.loss for e in got.history] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)], rel=1e-4)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_rate_rises_once_and_falls(steps: int, warmup: float) -> None:
    rates = [rate_factor(step, steps, warmup) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0 and all(0 < r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_repeats_itself_whatever_was_drawn_before_and_leaves_randomness_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    first = graphprune.finetune(net(), loader(generator), epochs=2)
    torch.rand(7), np.random.rand(3), random.random(), generator.manual_seed(77)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), generator.get_state()  # type: ignore[index, union-attr]
    model = net()
    torch.set_rng_state(states[0])
    before = copy.deepcopy(model.state_dict())
    second = graphprune.finetune(model, loader(generator), epochs=2)
    assert same(first.model, second.model) and first.history == second.history
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert torch.equal(generator.get_state(), states[3])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and not model.training
    assert not any(p.grad is not None for p in model.parameters())
    assert not same(first.model, graphprune.finetune(net(), loader(generator), epochs=2, seed=1).model)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("generator", [False, True])
def test_a_run_killed_at_any_batch_ends_with_the_same_weights(tmp_path: Path, kind: str, generator: bool) -> None:
    """3 epochs of 3 batches: killed at every one of them, at the borders of epochs and within."""

    def run(at: int, file: Path | None) -> graphprune.Finetuning:
        data = Killing(loader(torch.Generator() if generator else None), at)
        options: dict[str, Any] = {"optimizer": kind, "evaluate": [(X, Y)], "patience": 5, "checkpoint": file}
        return graphprune.finetune(net(), data, epochs=3, teacher=net(), **options)

    whole = run(100, None)
    for at in range(9):
        file = tmp_path / f"{at}.safetensors"
        with pytest.raises(Killed):
            run(at, file)
        assert file.exists() == (at >= 3)
        torch.rand(at + 1)
        found = run(100, file)
        assert same(found.model, whole.model), at
        assert (found.history, found.before, found.best_epoch) == (whole.history, whole.before, whole.best_epoch)
        again = run(0, file)  # nothing is left to do
        assert same(again.model, whole.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{at}.safetensors" for at in range(9)]


def test_killed_several_times(tmp_path: Path) -> None:
    whole = graphprune.finetune(net(), loader(), epochs=4, checkpoint=tmp_path / "whole")
    for at in (4, 5, 2, 0, 3):
        with pytest.raises(Killed):
            graphprune.finetune(net(), Killing(loader(), at), epochs=4, checkpoint=tmp_path / "parts")
    assert same(graphprune.finetune(net(), loader(), epochs=4, checkpoint=tmp_path / "parts").model, whole.model)


def test_masks_hold_and_frozen_parameters_stay() -> None:
    model = sparsity.magnitude(net(), 0.5)
    model.norm.weight.requires_grad_(False)
    done = graphprune.finetune(model, loader(), epochs=2)
    masks = sparsity.masks(done.model)
    assert masks and all(torch.equal(masks[k], v) for k, v in sparsity.masks(model).items())
    weight = done.model.conv.weight
    assert (weight[~masks["conv.weight"]] == 0).all() and not torch.equal(weight, model.conv.weight)  # type: ignore[index, arg-type]
    assert torch.equal(done.model.norm.weight, model.norm.weight)  # type: ignore[arg-type]


def test_early_stop_returns_the_best_weights() -> None:
    scores = iter([0.5, 0.7, 0.9, 0.9, 0.8, 0.95])
    kept: list[dict[str, Tensor]] = []
    done = graphprune.finetune(
        net(), loader(), epochs=9, evaluate=lambda model: next(scores), patience=2,
        on_epoch=lambda epoch, model: kept.append(copy.deepcopy(model.state_dict())),
    )  # fmt: skip
    assert [e.score for e in done.history] == [0.7, 0.9, 0.9, 0.8]
    assert (done.best_epoch, done.before, done.score, done.stopped_early) == (2, 0.5, 0.9, True)
    assert all(torch.equal(kept[1][k], v) for k, v in done.model.state_dict().items())
    model = net()
    falling = iter([0.9, 0.1, 0.1])
    worse = graphprune.finetune(model, loader(), epochs=2, evaluate=lambda m: next(falling), patience=2)
    assert worse.best_epoch == 0 and same(worse.model, model)
    assert "0.9000" in str(worse)


def test_epochs_zero_and_iterables_without_length() -> None:
    model = net()
    assert same(graphprune.finetune(model, loader(), epochs=0).model, model)

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return zip(X.split(16), Y.split(16), strict=True)

    batches = list(zip(X.split(16), Y.split(16), strict=True))
    streamed = graphprune.finetune(model, Stream(), epochs=2)
    assert same(streamed.model, graphprune.finetune(model, batches, epochs=2).model)


def test_models_that_return_their_own_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(pixels)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    pairs = list(zip(X.split(16), Y.split(16), strict=True))
    dicts = [{"pixels": x, "labels": y} for x, y in pairs]
    own = graphprune.finetune(Own(), dicts, epochs=2).model
    assert same(own.net, graphprune.finetune(net(), pairs, epochs=2).model)  # type: ignore[arg-type]


def test_bfloat16_on_the_cpu_trains() -> None:
    done = graphprune.finetune(net(), loader(), epochs=8, lr=0.1, amp=True, evaluate=[(X, Y)])
    plain = graphprune.finetune(net(), loader(), epochs=8, lr=0.1, amp=False)
    assert all(p.dtype == torch.float32 for p in done.model.parameters()) and not same(done.model, plain.model)
    assert done.history[-1].loss == pytest.approx(plain.history[-1].loss, rel=0.1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": -1}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"warmup": 1.5}, "warmup"),
        ({"optimizer": "adagard"}, "optimizer"),
        ({"optimizer": lambda m: 3}, "optimizer"),
        ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.1), "lr": 0.1}, "lr"),
        ({"amp": "maybe"}, "amp"),
        ({"patience": 1}, "evaluate"),
        ({"patience": 0, "evaluate": [(X, Y)]}, "patience"),
        ({"evaluate": [X]}, "evaluate"),
        ({"evaluate": lambda m: math.nan}, "evaluate"),
        ({"evaluate": [(X, Y.float())]}, "class numbers"),
        ({"distillation": graphprune.Distillation()}, "teacher"),
        ({"teacher": nn.Flatten()}, "teacher"),
        ({"loss_fn": lambda o, t: o}, "scalar"),
        ({"loss_fn": lambda o, t: o.nothing}, "AttributeError"),
        ({"loss_fn": lambda o, t: o.detach().sum()}, "does not depend"),
        ({"loss_fn": lambda o, t: o.sum() * math.inf}, "lower lr"),
        ({"checkpoint": "/no/such/folder/x"}, "folder"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphPruneError, match=text):
        graphprune.finetune(model, loader(), **options)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "no batch"),
        (3, "data"),
        (iter([(X, Y)]), "only once"),
        ([X], "no targets"),
        ([(X, Y.float())], "class numbers"),
        ([(X[:, :2], Y)], "the model raised"),
    ],
)
def test_bad_data_is_named(data: Any, text: str) -> None:
    with pytest.raises(GraphPruneError, match=text):
        graphprune.finetune(net(), data, epochs=1)


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    graphprune.finetune(net(), loader(), epochs=1, checkpoint=file)
    good = file.read_bytes()
    for options, text in (({"epochs": 2}, "epochs"), ({"epochs": 1, "seed": 4}, "seed")):
        with pytest.raises(GraphPruneError, match=text):
            graphprune.finetune(net(), loader(), checkpoint=file, **options)  # type: ignore[arg-type]
    other = net()
    other.fc = nn.Linear(8, 5)
    with pytest.raises(GraphPruneError, match="shapes"):
        graphprune.finetune(other, loader(), epochs=1, checkpoint=file)
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    about = json.loads(header["__metadata__"]["graphprune.training/3"])
    assert header["__metadata__"]["sha256"]
    for damage in ("history", "optimizer", "before", "best", "scaler"):
        broken = {k: v for k, v in about.items() if k != damage}
        text = json.dumps({**header, "__metadata__": {"graphprune.training/3": json.dumps(broken)}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length :])
        with pytest.raises(GraphPruneError, match="damaged"):
            graphprune.finetune(net(), loader(), epochs=1, checkpoint=file)
    for cut in (0, 5, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:cut])
        with pytest.raises(GraphPruneError, match="delete it"):
            graphprune.finetune(net(), loader(), epochs=1, checkpoint=file)
    file.write_bytes(good)
    graphprune.finetune(net(), loader(), epochs=1, checkpoint=file)
