"""`prune_gradually`: a ratio or budget reached in several steps, with training in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from ..planning.allocation import Budget
from ..planning.calls import check_recover
from ..planning.layers import ignored_names
from ..planning.request import Request, options_in, takes_options
from ..planning.shortfall import missed, shortfall, tell
from ..plans.folding import fold_conv_bn
from ..plans.naming import in_users_names
from ..plans.plan import Plan
from ..plans.verification import verify as run_verification
from ..recovery import BlockFit
from ..recovery import recover as recover_accuracy
from ..sparsity.channels import NOT_IN_STEPS, NOT_OF_CHANNELS, Channels
from ..sparsity.schedules import schedule as make_schedule
from ..support.doors import door
from ..support.numbers import check_integer
from ..support.progress import ProgressOption, reported, stage
from ..tracing.counting import count

Train = Callable[[nn.Module, int], nn.Module | None]


@door("model")
@reported("pruning in steps")
@takes_options(NOT_IN_STEPS)
def prune_gradually(
    model: nn.Module,
    example_input: Any,
    ratio: float | None = None,
    *,
    budget: Budget | None = None,
    steps: int = 5,
    schedule: str = "linear",
    train: Train | None = None,
    verify: bool = True,
    recover: str | BlockFit | None = None,
    progress: ProgressOption = None,
    **options: Any,
) -> nn.Module:
    """A smaller copy of `model`, pruned in `steps` steps that each choose anew from the weights as they are then.

    - `ratio`: the fraction of the *original* channels that is gone in the end (one number), or `budget`: limits of the
      final network; fractions are of the original. One of them; default is ratio 0.5.
    - `schedule`: how much of the way is gone after each step, a name known to `graphprune.sparsity.schedule`: "linear",
      "cubic" (late), "exponential" (early, also "zhu-gupta"), "sinusoidal" or "one-shot".
    - `train(model, step)`, after every step (from 1): trains the model in place and returns None, or returns a trained
      copy, such as `lambda model, step: graphprune.finetune(model, loader, epochs=1).model`. Without it the steps alone
      are taken, after `recover` if that is given.
    - `recover`: as in `prune`, applied at every step before `train`, against the model of the step before.
    - `strict`: whether it is an error, instead of a GraphPruneWarning, where nothing at all was removed in the end, or
      a latency was missed.
    - `fold_bn`: whether batch norms are folded into layers at the end. They stay while there is training.

    - `progress`: as in `plan`; `train` is a part of it, too.

    The others are those of `plan`. With `granularity` "layer", "branch" or "experts" the ratio is of those that could
    go at first. `macs` and `params` of a budget may be fractions or counts; other limits must be fractions, and are
    approached by the same fraction of what is there at every step.

    Raises GraphPruneError like `prune`, for unknown options and schedules, and where `train` returns something else.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> small = graphprune.prune_gradually(net, torch.randn(1, 4), 0.5, steps=2, train=lambda model, step: None)
    >>> small[0].out_features
    8
    """
    request = Request(ratio, budget=budget, **options)
    if isinstance(request.ratio, Mapping):
        raise GraphPruneError("ratio: expected one number in [0, 1), as what is named changes from step to step")
    check_integer("steps", steps, 1)
    if train is not None and not callable(train):
        raise GraphPruneError(f"train: expected a function (model, step) -> model or None, got {type(train).__name__}")
    check_recover(request, recover)
    way = make_schedule(schedule, 0.0, 0.5, steps)
    request = request.but(ignore=ignored_names(request.ignore, model)).with_data_for(model, example_input)
    shrink = _shrinker(model, example_input, request, verify)
    removed = False
    with stage("steps", steps, "steps") as now:
        for step in range(1, steps + 1):
            with stage("pruning"):
                small, made = shrink(model, way(step) / 0.5)
            removed = removed or not made.empty
            if step == steps:
                tell(missed(made) if removed else shrink.shortfall, request.strict)
            if recover is not None:
                small = recover_accuracy(model, made, example_input, request.data, recover).model
            with stage("training"):
                model = small if train is None else _trained(train, small, step)
            now.advance()
    return fold_conv_bn(model, example_input) if request.fold_bn else model


def _shrinker(
    model: nn.Module, example_input: Any, request: Request, verify: bool
) -> _ByRatio | _OfWholes | _ByBudget:
    """What takes each step."""
    if request.budget is not None:
        return _ByBudget(model, example_input, request, request.budget, verify)
    kind = _OfWholes if request.strategy.kinds is None else _ByRatio
    return kind(example_input, request, verify)


class _ByRatio:
    """Towards a ratio of the original channels."""

    def __init__(self, example_input: Any, request: Request, verify: bool) -> None:
        self.ratio = _number(request)
        taken = {name: value for name, value in options_in(vars(request)).items() if name not in NOT_OF_CHANNELS}
        self.channels = Channels(example_input, verify=verify, **taken)

    def __call__(self, model: nn.Module, part: float) -> tuple[nn.Module, Plan]:
        small = self.channels(model, self.ratio * part)
        assert self.channels.plan is not None
        return small, self.channels.plan

    @property
    def shortfall(self) -> str:
        """Why nothing went in the latest step; empty where it was told already, or nothing was asked."""
        return "" if self.channels.told else self.channels.shortfall


class _OfWholes:
    """Towards a ratio of the original layers, or of what else goes as a whole."""

    def __init__(self, example_input: Any, request: Request, verify: bool) -> None:
        self.example_input, self.request, self.verify = example_input, request, verify
        self.ratio = _number(request)
        self.before: list[Plan] = []
        self.shortfall = ""

    def __call__(self, model: nn.Module, part: float) -> tuple[nn.Module, Plan]:
        asked = self.request.but(ratio=self.ratio * part)
        bare = plain(model)
        found = asked.strategy.further(bare, self.example_input, asked, self.before)
        found = dataclasses.replace(found, plan=in_users_names(found.plan, bare, model))
        self.shortfall = shortfall(found)
        self.before.append(found.plan)
        return _cut(model, found.plan, self.example_input, self.verify), found.plan


class _ByBudget:
    """Towards a budget: `part` of the way from all that the original has."""

    def __init__(self, model: nn.Module, example_input: Any, request: Request, budget: Budget, verify: bool) -> None:
        self.example_input, self.verify = example_input, verify
        self.request = request.but(fold_bn=False)
        found = count(model, example_input)
        full = {"macs": found.macs, "params": found.parameters}
        self.before: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        for name, value in budget.limits().items():
            if name in full:
                self.before[name] = float(full[name])
                self.ends[name] = value * full[name] if value <= 1 else float(value)
            elif value > 1 or name == "latency_ms":
                raise GraphPruneError(f"budget: {name} cannot be approached in steps; give a fraction of the original")
            else:
                self.before[name], self.ends[name] = 1.0, float(value)
        self.counted = frozenset(full)
        self.last = dict(self.before)
        self.shortfall = ""

    def __call__(self, model: nn.Module, part: float) -> tuple[nn.Module, Plan]:
        now = {n: full + (self.ends[n] - full) * part for n, full in self.before.items()}
        limits = {n: value if n in self.counted else value / self.last[n] for n, value in now.items()}
        self.last = now
        found = self.request.but(budget=Budget(**limits)).decide(model, self.example_input)
        self.shortfall = shortfall(found)
        return _cut(model, found.plan, self.example_input, self.verify), found.plan


def _number(request: Request) -> float:
    assert isinstance(request.ratio, float)
    return request.ratio


def _cut(model: nn.Module, made: Plan, example_input: Any, verify: bool) -> nn.Module:
    small = made.apply(model)
    if verify:
        run_verification(model, small, made, example_input).raise_on_failure()
    return small


def _trained(train: Train, model: nn.Module, step: int) -> nn.Module:
    result = train(model, step)
    if result is None:
        return model
    if not isinstance(result, nn.Module):
        raise GraphPruneError(f"train: expected it to return a model or None, got {type(result).__name__}")
    return result
