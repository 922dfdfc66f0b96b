"""`prune_gradually`: a ratio or budget reached in several steps, with training in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..planning.allocation import Budget
from ..planning.allocation.selection import check_ratio
from ..planning.allocation.steps import RoundTo
from ..planning.layers import ignored_names
from ..planning.request import Criterionlike, decide
from ..planning.shortfall import tell
from ..plans.folding import fold_conv_bn
from ..plans.plan import Plan
from ..plans.verification import verify as run_verification
from ..recovery import check_method, recover
from ..sparsity.scheduler import Channels
from ..sparsity.schedules import schedule as make_schedule
from ..support.doors import door
from ..support.types import Ignore, LossFunction
from ..tracing.counting import count

Train = Callable[[nn.Module, int], nn.Module | None]


@door("model")
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
    ignore: Ignore = (),
    scope: str = "local",
    criterion: Criterionlike | None = None,
    round_to: RoundTo = "auto",
    min_channels: int = 1,
    granularity: str | Sequence[str] = "auto",
    fold_bn: bool = True,
    seed: int = 0,
    data: Any = None,
    loss_fn: LossFunction | None = None,
    recover: str | None = None,
    strict: bool = False,
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
    - `strict`: whether it is an error, instead of a GraphPruneWarning, where nothing at all was removed in the end.
    - `fold_bn`: whether batch norms are folded into layers at the end. They stay while there is training.

    The others are those of `plan`. `macs` and `params` of a budget may be fractions or counts; other limits must be
    fractions, and are approached by the same fraction of what is there at every step.

    Raises GraphPruneError like `prune`, for an unknown schedule, and where `train` returns something else.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> small = graphprune.prune_gradually(net, torch.randn(1, 4), 0.5, steps=2, train=lambda model, step: None)
    >>> small[0].out_features
    8
    """
    if budget is not None and ratio is not None:
        raise GraphPruneError("ratio and budget exclude each other: a budget decides how much of each group stays")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise GraphPruneError(f"steps: expected an integer of at least 1, got {steps!r}")
    if train is not None and not callable(train):
        raise GraphPruneError(f"train: expected a function (model, step) -> model or None, got {type(train).__name__}")
    check_method(recover, data)
    way = make_schedule(schedule, 0.0, 0.5, steps)
    chosen: dict[str, Any] = {
        "ignore": ignored_names(ignore, model), "scope": scope, "criterion": criterion, "round_to": round_to,
        "min_channels": min_channels, "granularity": granularity, "seed": seed, "data": data, "loss_fn": loss_fn,
    }  # fmt: skip
    wanted = check_ratio(0.5 if ratio is None else ratio)
    shrink: _ByRatio | _ByBudget = (
        _ByRatio(example_input, wanted, verify, {**chosen, "strict": strict})
        if budget is None
        else _ByBudget(model, example_input, budget, verify, chosen)
    )
    removed = False
    for step in range(1, steps + 1):
        small, made = shrink(model, way(step) / 0.5)
        removed = removed or not made.empty
        if step == steps and not removed:
            tell(shrink.shortfall, strict)
        if recover is not None:
            small = _recovered(model, made, example_input, data, recover)
        model = small if train is None else _trained(train, small, step)
    return fold_conv_bn(model, example_input) if fold_bn else model


class _ByRatio:
    """Towards a ratio of the original channels."""

    def __init__(self, example_input: Any, ratio: float, verify: bool, chosen: dict[str, Any]) -> None:
        self.channels, self.ratio = Channels(example_input, verify=verify, **chosen), ratio

    def __call__(self, model: nn.Module, part: float) -> tuple[nn.Module, Plan]:
        small = self.channels(model, self.ratio * part)
        assert self.channels.plan is not None
        return small, self.channels.plan

    @property
    def shortfall(self) -> str:
        """Why nothing went in the latest step; empty where it was told already, or nothing was asked."""
        return "" if self.channels.told else self.channels.shortfall


class _ByBudget:
    """Towards a budget: `part` of the way from all that the original has."""

    def __init__(
        self, model: nn.Module, example_input: Any, budget: Budget, verify: bool, chosen: dict[str, Any]
    ) -> None:
        if not isinstance(budget, Budget):
            raise GraphPruneError(f"budget: expected a graphprune.Budget, got {type(budget).__name__}")
        self.example_input, self.verify, self.chosen = example_input, verify, chosen
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
        made, self.shortfall = decide(
            model, self.example_input, budget=Budget(**limits), fold_bn=False, **self.chosen
        )
        small = made.apply(model)
        if self.verify:
            run_verification(model, small, made, self.example_input).raise_on_failure()
        return small, made


def _recovered(model: nn.Module, made: Plan, example_input: Any, data: Any, method: str) -> nn.Module:
    return recover(model, made, example_input, data, method).model


def _trained(train: Train, model: nn.Module, step: int) -> nn.Module:
    result = train(model, step)
    if result is None:
        return model
    if not isinstance(result, nn.Module):
        raise GraphPruneError(f"train: expected it to return a model or None, got {type(result).__name__}")
    return result
