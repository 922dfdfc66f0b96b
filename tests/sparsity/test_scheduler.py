from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import nn

import graphprune
import models
from graphprune import GraphPruneError, sparsity
from graphprune.planning.allocation.rounding import nearest
from graphprune.sparsity import Channels, Scheduler, magnitude, schedule

from .networks import mlp


def train(model: nn.Module, x: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    model(x).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", ["linear", "cubic", "exponential", "sinusoidal", "one-shot", "zhu-gupta"])
def test_masks_are_exactly_at_target_at_every_step_of_training(name: str, scope: str) -> None:
    model = mlp()
    plan = schedule(name, 0.1, 0.9, 9, begin=1, frequency=2)
    scheduler = Scheduler(model, plan, functools.partial(magnitude, scope=scope))
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    x = torch.randn(8, 12)
    before: dict[str, torch.Tensor] = {}
    for step in range(13):
        sizes = [240, 320, 48]
        zeros = [int((model[i].weight == 0).sum()) for i in (0, 3, 5)]
        wanted = plan(step)
        if scope == "layer":
            assert zeros == [nearest(wanted * n) for n in sizes]
        else:
            assert sum(zeros) == nearest(wanted * sum(sizes))
        now = sparsity.masks(model)
        assert not any((now[k] & ~before[k]).any() for k in before)
        before = now
        assert scheduler.sparsity == wanted and scheduler.steps == step
        train(model, x, optimiser)
        assert all(not model.get_submodule(k[0]).weight[~mask].any() for k, mask in now.items())
        assert scheduler.step() is model
        assert scheduler.changed == (plan(step + 1) != wanted)


@pytest.mark.parametrize("build", [models.digits_resnet, models.tiny_vit])
def test_channels_are_exactly_at_target_at_every_step(build) -> None:
    model, x = build()
    plan = schedule("exponential", 0.0, 0.6, 4)
    method = Channels(x, round_to=1)
    scheduler = Scheduler(model, plan, method)
    dense = {g.name + " " + g.kind: g.size for g in graphprune.plan(model, x, 0.5).groups}
    for step in range(1, 5):
        smaller = scheduler.step()
        groups = {g.name + " " + g.kind: g.size for g in graphprune.plan(smaller, x, 0.5).groups}
        for key, size in method.widths.items():
            assert dense[key] == size and groups[key] == size - nearest(plan(step) * size)
        assert scheduler.changed and smaller is scheduler.model
    assert smaller(x).isfinite().all() and model(x).shape == smaller(x).shape


def test_channels_over_all_groups_together() -> None:
    model, x = models.digits_resnet()
    method = Channels(x, scope="global", criterion="l1", round_to=1)
    scheduler = Scheduler(model, schedule("linear", 0.0, 0.5, 3), method)
    for step in range(1, 4):
        small = scheduler.step()
        left = sum(g.size for g in graphprune.plan(small, x, 0.5).groups)
        total = sum(method.widths.values())
        assert abs(total - left - nearest(schedule("linear", 0.0, 0.5, 3)(step) * total)) <= 1


def test_a_stopped_run_goes_on_alike() -> None:
    x = torch.randn(8, 12)
    plan = schedule("cubic", 0.0, 0.8, 6)
    start = mlp()

    def run(model: nn.Module, scheduler: Scheduler, count: int) -> None:
        for _ in range(count):
            train(model, x, torch.optim.SGD(model.parameters(), 0.1))
            scheduler.step()

    whole = copy.deepcopy(start)
    run(whole, Scheduler(whole, plan), 6)
    first = copy.deepcopy(start)
    scheduler = Scheduler(first, plan)
    run(first, scheduler, 3)
    state = json.loads(json.dumps(scheduler.state_dict()))
    second = sparsity.set_masks(copy.deepcopy(start), sparsity.masks(first))
    second.load_state_dict(first.state_dict())
    later = Scheduler(second, plan)
    later.load_state_dict(state)
    run(second, later, 3)
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_stopped_structured_run_remembers_the_first_widths() -> None:
    model, x = models.digits_resnet()
    plan = schedule("linear", 0.0, 0.6, 4)
    scheduler = Scheduler(model, plan, Channels(x))
    scheduler.step()
    middle = scheduler.step()
    other = Scheduler(middle, lambda step: 0.0 if step == 0 else plan(step), Channels(x))
    other.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    for mine, theirs in ((scheduler.step(), other.step()), (scheduler.step(), other.step())):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_errors() -> None:
    model = mlp()
    falling = Scheduler(model, lambda step: 0.5 if step == 1 else 0.2)
    falling.step()
    with pytest.raises(GraphPruneError, match=r"schedule\(2\) is 0.2, below the 0.5 reached"):
        falling.step()
    with pytest.raises(GraphPruneError, match=r"schedule\(0\): expected a number in \[0, 1\)"):
        Scheduler(model, lambda step: 1.5)
    with pytest.raises(GraphPruneError, match="expected it to return the model, got NoneType"):
        Scheduler(model, lambda step: 0.9, lambda m, s: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(GraphPruneError, match="expected a schedule"):
        Scheduler(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(GraphPruneError, match="no number of steps"):
        Scheduler(mlp(), lambda step: 0.0).load_state_dict({})
    with pytest.raises(GraphPruneError, match="no widths"):
        Scheduler(mlp(), lambda step: 0.0, Channels(torch.randn(1, 12))).load_state_dict({"steps": 1, "sparsity": 0.5})
    with pytest.raises(GraphPruneError, match="no channels to remove"):
        Channels(torch.randn(1, 4))(nn.Linear(4, 4), 0.5)


def test_the_optimizer_follows_the_channels() -> None:
    model = mlp()
    x = torch.randn(8, 12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    method = Channels(x)
    scheduler = Scheduler(model, schedule("linear", 0.0, 0.6, 3), method, optimizer)
    for _ in range(3):
        train(scheduler.model, x, optimizer)
        before = {n: optimizer.state[p]["exp_avg"].clone() for n, p in scheduler.model.named_parameters()}
        old = scheduler.model
        small = scheduler.step()
        assert scheduler.changed and small is not old and method.plan is not None and method.plan.removed
        assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, small.parameters()))
        for name, parameter in small.named_parameters():
            wanted = before[name]
            for axis, gone in method.plan.removed.get(name, {}).items():
                wanted = wanted[(slice(None),) * axis + ([i for i in range(wanted.shape[axis]) if i not in gone],)]
            assert torch.equal(optimizer.state[parameter]["exp_avg"], wanted)
    masked = mlp()
    optimizer = torch.optim.Adam(masked.parameters())
    assert Scheduler(masked, lambda step: 0.5, magnitude, optimizer).model is masked
    with pytest.raises(GraphPruneError, match="plan"):
        Scheduler(masked, lambda step: 0.5, lambda m, s: copy.deepcopy(m), optimizer)


def test_channels_are_chosen_by_criteria_that_need_data() -> None:
    model, x = mlp(), torch.randn(8, 12)
    data = [(torch.randn(16, 12), torch.randint(0, 3, (16,))) for _ in range(2)]
    method = Channels(x, criterion="taylor", data=data, loss_fn=nn.functional.cross_entropy)
    method(model, 0.5)
    wanted = graphprune.plan(
        model, x, 0.5, criterion="taylor", data=data, loss_fn=nn.functional.cross_entropy, fold_bn=False
    )
    assert method.plan is not None and method.plan.removed == wanted.removed
    with pytest.raises(GraphPruneError, match="data"):
        Channels(x, criterion="taylor")
