"""Runs that were stopped at any epoch against whole ones, where the loss holds weights, buffers and counters itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune import GraphPruneError

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 5, (48,), generator=torch.Generator().manual_seed(2))
DATA = list(zip(X.split(16), Y.split(16), strict=True))


class Margin(nn.Module):
    """Cosines to class vectors that are learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(3)))

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(8 * F.normalize(output) @ F.normalize(self.vectors).T, targets)


class Centred(nn.Module):
    """A pull to a moving average, which is set anew and not written to; the pull grows with the number of calls."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))
        self.calls, self.least, self.last = 0, math.inf, None

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            self.centre = 0.9 * self.centre + 0.1 * output.mean(0)
            self.last = output.mean(0) if self.last is None else self.last + output.mean(0)
        self.calls += 1
        pull = (output - self.centre - 0.1 * self.last).pow(2).mean()
        loss = F.cross_entropy(output[:, :5], targets) + 0.05 * self.calls * pull
        self.least = min(self.least, float(loss.detach()))
        return loss + 0.01 * self.least * output.pow(2).mean()


class Plain:
    """No module, with the same in itself and in what it holds."""

    def __init__(self) -> None:
        self.parts, self.weight, self.calls = [Margin()], nn.Parameter(torch.zeros(())), 0

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        loss = self.parts[0](output, targets) * torch.exp(-self.weight) + self.weight
        return loss + 0.02 * self.calls * output.pow(2).mean()

    def loss(self, scale: float, output: Tensor, targets: Tensor) -> Tensor:
        return scale * self(output, targets)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, *self.parts[0].parameters()]


def _module(kind: Callable[[], nn.Module]) -> tuple[Any, list[nn.Parameter]]:
    loss = kind()
    return loss, list(loss.parameters())


def _object() -> tuple[Any, list[nn.Parameter]]:
    loss = Plain()
    return loss, loss.parameters()


def _partial() -> tuple[Any, list[nn.Parameter]]:
    loss = Plain()
    return functools.partial(loss.loss, 0.5), loss.parameters()


def _closure() -> tuple[Any, list[nn.Parameter]]:
    centred, weight, calls = Centred(), nn.Parameter(torch.zeros(())), 0

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return centred(output, targets) * torch.exp(-weight) + weight + 0.01 * calls * output.pow(2).mean()

    return loss, [weight]


SHARED: dict[str, Any] = {}


def _hidden() -> tuple[Any, list[nn.Parameter]]:
    """A weight that is not found by looking at the loss, and known by the optimizer alone."""
    SHARED["weight"] = nn.Parameter(torch.zeros(()))
    return (lambda output, targets: F.cross_entropy(output[:, :5], targets) * torch.exp(-SHARED["weight"])), [
        SHARED["weight"]
    ]


MAKERS: dict[str, Callable[[], tuple[Any, list[nn.Parameter]]]] = {
    "weights": lambda: _module(Margin),
    "buffers and counters": lambda: _module(Centred),
    "both, in a list": lambda: _module(lambda: Both()),
    "object": _object,
    "partial of a method": _partial,
    "closure": _closure,
    "known by the optimizer alone": _hidden,
}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Margin(), Centred()])

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        first, second = (part(output, targets) for part in self.parts)
        return torch.as_tensor(first + second)


class Stop(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8))


def run(
    made: tuple[Any, list[nn.Parameter]], checkpoint: Path | None = None, stop: int | None = None, kind: str = "sgd"
) -> tuple[nn.Module, list[Tensor]]:
    loss, own = made

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [*own, *model.parameters()]
        return torch.optim.SGD(trained, 0.1, 0.9) if kind == "sgd" else torch.optim.Adam(trained, 0.01)

    def on_epoch(epoch: graphprune.Epoch, model: nn.Module) -> None:
        if epoch.number == stop:
            raise Stop

    done = graphprune.finetune(
        network(), DATA, epochs=4, loss_fn=loss, optimizer=optimizer, checkpoint=checkpoint, on_epoch=on_epoch,
        progress=False,
    )  # fmt: skip
    return done.model, own


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_stopped_run_ends_with_the_same_weights_whatever_the_loss_holds(tmp_path: Path, name: str, kind: str) -> None:
    whole, weights = run(MAKERS[name](), kind=kind)
    for stop in (1, 3):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(Stop):
            run(MAKERS[name](), path, stop, kind)
        resumed, again = run(MAKERS[name](), path, kind=kind)
        for a, b in zip((*whole.parameters(), *weights), (*resumed.parameters(), *again), strict=True):
            assert torch.equal(a, b)


def test_a_loss_that_went_on_is_taken_back_to_where_the_checkpoint_is(tmp_path: Path) -> None:
    whole, _ = run(_module(Centred))
    path, made = tmp_path / "run.safetensors", _module(Centred)
    with pytest.raises(Stop):
        run(made, path, 2)
    made[0](torch.randn(3, 8), torch.zeros(3).long())  # as in a notebook: the same object is used on
    with pytest.raises(Stop):
        run(made, path, 3)
    resumed, _ = run(made, path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_options_of_the_loss_are_those_that_are_passed(tmp_path: Path) -> None:
    """What does not change while it is used is a setting, and not taken from the file."""

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, output: Tensor, targets: Tensor) -> Tensor:
            return self.scale * F.cross_entropy(output, targets)

    path, loss = tmp_path / "run.safetensors", Scaled(0.5)
    graphprune.finetune(network(), DATA, epochs=1, loss_fn=Scaled(1.0), checkpoint=path, progress=False)
    graphprune.finetune(network(), DATA, epochs=1, loss_fn=loss, checkpoint=path, progress=False)
    assert loss.scale == 0.5


def test_networks_that_the_loss_knows_are_not_written_to(tmp_path: Path) -> None:
    """The network that is trained a copy of, and the teacher, are no part of the loss."""
    model, teacher, path = network(), network(), tmp_path / "run.safetensors"

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        away = sum((p.pow(2).sum() for net in (model, teacher) for p in net.parameters()), torch.zeros(()))
        return F.cross_entropy(output, targets) + 0 * away

    options: dict[str, Any] = {"epochs": 2, "loss_fn": loss, "teacher": teacher, "checkpoint": path, "progress": False}
    graphprune.finetune(model, DATA, **options)
    with torch.no_grad():
        for net in (model, teacher):
            for p in net.parameters():
                p.add_(1)
    before = [p.clone() for net in (model, teacher) for p in net.parameters()]
    graphprune.finetune(model, DATA, **options)
    assert all(torch.equal(a, p) for a, p in zip(before, [*model.parameters(), *teacher.parameters()], strict=True))


@pytest.mark.parametrize("other", ["weights", "closure", "known by the optimizer alone"])
def test_another_loss_is_refused_before_anything_changes(tmp_path: Path, other: str) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(MAKERS["buffers and counters"](), path, 1)
    made = MAKERS[other]()
    before = [p.clone() for p in made[1]]
    with pytest.raises(GraphPruneError, match=r"of another (loss|run)"):
        run(made, path)
    assert all(torch.equal(a, b) for a, b in zip(before, made[1], strict=True))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(_module(Margin), path, 1)
    other = Margin()
    other.vectors = nn.Parameter(torch.randn(7, 8))
    with pytest.raises(GraphPruneError, match=r"vectors does not fit; pass the same loss_fn"):
        run((other, list(other.parameters())), path)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)


def test_an_optimizer_that_asks_for_a_closure_is_given_one() -> None:
    model, want = network().eval(), network().eval()
    for net in (model, want):
        net[2] = nn.Identity()  # type: ignore[index]
    done = graphprune.finetune(model, DATA, epochs=2, optimizer=lbfgs, clip=None, warmup=0.0, progress=False)
    optimizer, step = lbfgs(want), 0
    losses = []
    for _ in range(2):
        for x, y in DATA:
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(want(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            losses.append(float(optimizer.step(closure).detach()))  # type: ignore[no-untyped-call]
            step += 1
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), want.parameters(), strict=True))
    assert [e.loss for e in done.history] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_an_optimizer_whose_step_fails_is_named() -> None:
    class Sharp(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if closure is None:
                raise ValueError("needs a closure")

    with pytest.raises(GraphPruneError, match=r"Sharp.step failed \(ValueError: needs a closure\).*asks for one"):
        graphprune.finetune(network(), DATA, epochs=1, optimizer=lambda m: Sharp(m.parameters(), 0.1), progress=False)


def test_lbfgs_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def train(checkpoint: Path | None, stop: int | None = None) -> nn.Module:
        def on_epoch(epoch: graphprune.Epoch, model: nn.Module) -> None:
            if epoch.number == stop:
                raise Stop

        options: dict[str, Any] = {"checkpoint": checkpoint, "on_epoch": on_epoch, "progress": False}
        return graphprune.finetune(network(), DATA, epochs=3, optimizer=lbfgs, **options).model

    whole, path = train(None), tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        train(path, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), train(path).parameters(), strict=True))


def test_what_cannot_be_stored_of_an_optimizer_is_said(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["seen"] = {1, 2}

    with pytest.raises(GraphPruneError, match="Odd keeps a set as 'seen'"):
        graphprune.finetune(
            network(), DATA, epochs=1, optimizer=lambda m: Odd(m.parameters(), 0.1), progress=False,
            checkpoint=tmp_path / "run.safetensors",
        )  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_trains_whatever_the_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    want = graphprune.finetune(network(), DATA, epochs=2, progress=False).model
    with mode():
        made = graphprune.finetune(network(), DATA, epochs=2, progress=False)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), made.model.parameters(), strict=True))
    assert all(p.requires_grad and not p.is_inference() for p in made.model.parameters())


def test_a_loss_that_leads_to_no_weight_says_where_to_look() -> None:
    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.detach(), targets)

    with pytest.raises(GraphPruneError, match=r"look for torch.no_grad, detach or argmax"):
        graphprune.finetune(network(), DATA, epochs=1, loss_fn=loss, progress=False)
