"""Runs that were stopped at any epoch against whole ones, where the loss holds weights, buffers and counters itself."""

from __future__ import annotations

import collections
import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune import GraphPruneError, GraphPruneWarning
from graphprune.recovery.training.losses import LossState
from graphprune.recovery.training.values import fits, taken, written

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


class Seen(NamedTuple):
    mean: Tensor
    number: int


class Tracker:
    """An object with slots that another one leads to."""

    __slots__ = ("last", "number", "unchanged")

    def __init__(self) -> None:
        self.last, self.number, self.unchanged = torch.zeros(8), 0, [torch.zeros(8)]


class Containers:
    """Queues, tables, arrays, generators and objects, of which each is of weight for the loss."""

    calls = 0  # of the class until it is set

    def __init__(self) -> None:
        self.last = Seen(torch.zeros(8), 0)
        self.queue: list[Tensor] = []
        self.losses: collections.deque[float] = collections.deque(maxlen=3)
        self.table: dict[Any, Any] = {"mean": torch.zeros(8), ("calls", 1): [0], "name": Tracker()}
        self.array, self.known = np.zeros(8, dtype=np.float32), {1}
        self.draws = torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)
        self.tracker = Tracker()

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        mean = output.detach().mean(0)
        self.queue = [*self.queue[-1:], mean]
        self.table["mean"] = 0.9 * self.table["mean"] + mean
        self.table["calls", 1][0] += 1
        self.array = 0.9 * self.array + mean.numpy()
        self.known.add(int(targets[0]))
        self.tracker.last.mul_(0.9).add_(mean)
        self.tracker.number += 1
        self.calls += 1
        self.last = Seen(mean, 1 + self.last.number)
        noise = torch.rand(8, generator=self.draws[0]) + self.draws[1].random() + self.draws[2].random()
        pulls = [*self.queue, self.table["mean"], torch.from_numpy(self.array), self.tracker.last, self.last.mean]
        counted = self.table["calls", 1][0] + self.tracker.number + self.last.number + len(self.known) + self.calls
        self.losses.append(float(mean.square().mean()))
        loss = F.cross_entropy(output[:, :5], targets) + 0.01 * counted * output.square().mean() * sum(self.losses)
        return loss + sum(((output - pull).square().mean() for pull in (*pulls, noise)), torch.zeros(()))


COUNTED: list[float] = []
CALLS = 0


def _scaled(output: Tensor) -> Tensor:
    """What it holds has a global name, and it is itself named by the loss alone."""
    global CALLS
    CALLS += 1
    COUNTED.append(float(output.detach().mean()))
    return (CALLS + sum(COUNTED[-2:])) * output.square().mean()


def _globals() -> tuple[Any, list[nn.Parameter]]:
    global CALLS
    CALLS = 0
    COUNTED.clear()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :5], targets) + _scaled(output)

    return loss, []


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
    "containers": lambda: (Containers(), []),
    "global names": _globals,
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


CASES = [(name, kind) for name in MAKERS for kind in ("sgd", "adam") if kind == "sgd" or MAKERS[name]()[1]]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_stopped_run_ends_with_the_same_weights_whatever_the_loss_holds(tmp_path: Path, name: str, kind: str) -> None:
    whole, weights = run(MAKERS[name](), kind=kind)
    for stop in (1, 3):
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(Stop):
            run(MAKERS[name](), path, stop, kind)
        resumed, again = run(MAKERS[name](), path, kind=kind)
        for a, b in zip((*whole.parameters(), *weights), (*resumed.parameters(), *again), strict=True):
            assert torch.equal(a, b)


def test_what_has_not_changed_and_what_is_no_data_is_not_taken_from_the_file(tmp_path: Path) -> None:
    path, made = tmp_path / "run.safetensors", Containers()
    with pytest.raises(Stop):
        run((made, []), path, 1)
    stored = safetensors.torch.load_file(path)
    held = {name for name in stored if name.startswith("loss/")}
    assert sum(t.numel() for name, t in stored.items() if name in held and t.dtype == torch.float32) <= 7 * 8
    other = Containers()
    tracker, unchanged = other.table["name"], other.tracker.unchanged[0]
    unchanged.add_(1)
    run((other, []), path)
    assert other.table["name"] is tracker and other.tracker.unchanged[0] is unchanged and float(unchanged.mean()) == 1
    assert other.losses.maxlen == 3 and len(other.losses) == 3


@pytest.mark.parametrize(
    "value",
    [
        {"list": [{"tensor": "model/0.weight"}]}, {"list": 1}, {"stays": "Tensor"}, {"dict": [[1]]}, {"what": []}, {},
        {"dict": [[{"list": []}, 1]]}, {"set": [{"list": []}]}, {"float": "1"},
        {"int": "0x1"}, {"random": {"list": []}}, [], {"tensor": []},
    ],
)  # fmt: skip
def test_damaged_values_are_refused_and_change_nothing(value: Any) -> None:
    loss = Containers()
    state = LossState(loss)
    for place in ("queue", "table", "draws"):
        before = written(vars(loss), "", lambda place, tensor, own: "")
        with pytest.raises(GraphPruneError, match=f"Containers.{place} does not fit"):
            state.load({"model/0.weight": torch.zeros(3)}, {f"loss/0.Containers.{place}": value})
        assert written(vars(loss), "", lambda place, tensor, own: "") == before
    with pytest.raises(GraphPruneError, match="__class__ does not fit"):
        state.load({}, {"loss/0.Containers.__class__": 1})


def test_what_cannot_be_stored_of_a_loss_is_said(tmp_path: Path) -> None:
    class Made:
        def __init__(self) -> None:
            self.tracker: Any = None
            self.seen: Any = None

        def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
            self.tracker = self.tracker or Tracker()
            self.seen = Seen(output.detach().mean(0), 1)
            return F.cross_entropy(output, targets)

    with pytest.warns(GraphPruneWarning, match=r"the loss holds in 0.Made.seen, 0.Made.tracker what") as told:
        run((Made(), []), tmp_path / "run.safetensors")
    assert len(told) == 1


def test_values_come_back_as_they_were() -> None:
    held: dict[str, Tensor] = {}

    def naming(place: str, tensor: Tensor, own: bool) -> str:
        held[place] = tensor
        return place

    shared: list[Any] = [1]
    shared.append(shared)
    value = {
        "a": [1, 2.5, math.inf, None, True, "text", 3**60, -(2**64)],
        (1, "b"): (torch.arange(3), np.float32(2)), "c": {3, 4},
        "d": collections.OrderedDict(x=np.arange(4)), "e": collections.Counter("aab"), "f": collections.deque([1]),
        "g": shared,
    }  # fmt: skip
    stored = json.loads(json.dumps(written(value, "v", naming)))
    now = {"g": shared}
    assert fits(stored, now, held) and not fits(stored, {}, held)
    back = taken(stored, now, held)
    assert back is now and back["g"] is shared and shared[1] is shared
    for key in ("a", (1, "b"), "c", "f"):
        assert repr(back[key]) == repr(value[key])
    assert np.array_equal(back["d"]["x"], np.arange(4)) and back["e"] == {"a": 2, "b": 1}


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
