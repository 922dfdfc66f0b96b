"""Pruning in the course of a training: when a schedule asks for more, a method brings the model there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import GraphPruneError
from ...importance import resolve_criterion
from ...planning.allocation import Budget
from ...planning.request import decide
from ...planning.shortfall import tell
from ...plans.plan import Plan
from ...plans.verification import verify
from ...recovery import recover
from ...recovery.training.loop import Trainer
from ...recovery.training.objective import default_loss
from ...recovery.training.randomness import seed_epoch
from ...recovery.training.runs import Score
from ...sparsity import Channels, gradient, magnitude, masks, set_masks
from ...sparsity.scheduler import Method
from ...sparsity.weights import find_weights
from ...support.runs import counted, score
from ...support.suggestions import check_choice
from ...support.types import LossFunction

METHODS = ("channels", "layers", "magnitude", "gradient")
# Randomness of pruning steps is that of epochs which no training reaches.
_STEP_SEEDS = 10**6


@dataclasses.dataclass(frozen=True)
class PruningStep:
    """Before `epoch` (from 1) the model was brought to `sparsity`, and had `score` right after that. With a budget
    `sparsity` is None."""

    epoch: int
    sparsity: float | None
    score: float | None


class Planned:
    """A method that plans once: for a budget, whatever the sparsity asked for, or for that ratio."""

    def __init__(self, example_input: Any, budget: Budget | None, options: Mapping[str, Any]) -> None:
        self.example_input, self.budget, self.options = example_input, budget, dict(options)
        self.checked = bool(self.options.pop("verify", True))
        self.strict = bool(self.options.pop("strict", False))
        self.plan: Plan | None = None

    def __call__(self, model: nn.Module, sparsity: float) -> nn.Module:
        """A smaller copy of the model."""
        ratio = None if self.budget is not None else sparsity
        self.plan, shortfall = decide(
            model, self.example_input, ratio, budget=self.budget, fold_bn=False, **self.options
        )
        tell(shortfall, self.strict)
        small = self.plan.apply(model)
        if self.checked:
            verify(model, small, self.plan, self.example_input).raise_on_failure()
        return small


def method_of(
    method: str | Method,
    example_input: Any,
    budget: Budget | None,
    options: Mapping[str, Any] | None,
    calibration: Any,
    loss_fn: LossFunction | None,
    seed: int,
    strict: bool,
) -> Method:
    """A function (model, sparsity) -> model, from the public arguments. Raises GraphPruneError for what is none."""
    chosen = dict(options or {})
    if method in ("channels", "layers"):
        chosen = {"strict": strict, **chosen}
    if method not in ("channels", "layers") and budget is not None:
        raise GraphPruneError("budget: only methods 'channels' and 'layers' work towards one; give a sparsity instead")
    if callable(method):
        if chosen:
            raise GraphPruneError("options: are those of a named method; build yours into the function")
        return method
    check_choice("method", method, METHODS, "a function (model, sparsity) -> model")
    try:
        if method == "channels":
            criterion = resolve_criterion(chosen.get("criterion"))
            if criterion.needs is not None:
                chosen = {"data": calibration, **chosen}
            if criterion.needs == "loss":
                chosen = {"loss_fn": loss_fn or default_loss, **chosen}
            chosen = {"seed": seed, **chosen}
            if budget is not None:
                return Planned(example_input, budget, chosen)
            return Channels(example_input, **chosen)
        if method == "layers":
            chosen = {"data": calibration, "loss_fn": loss_fn or default_loss, **chosen, "granularity": "layer"}
            return Planned(example_input, budget, chosen)
        if method == "magnitude":
            return lambda model, sparsity: magnitude(model, sparsity, **chosen)
        loss = loss_fn or default_loss
        return lambda model, sparsity: gradient(model, calibration, loss, sparsity, **chosen)
    except TypeError as error:
        raise GraphPruneError(f"options: {error}") from error


class GradualPruner:
    """Brings the model to `schedule(1)`, ..., `schedule(steps)` before the first `steps` epochs."""

    def __init__(
        self,
        method: Method,
        schedule: Callable[[int], float],
        steps: int,
        *,
        evaluate: Score | None,
        data: Any,
        calibration: Any,
        example_input: Any,
        recovery: str | None,
        seed: int,
    ) -> None:
        self.method, self.schedule, self.steps = method, schedule, steps
        self.evaluate, self.data, self.seed = evaluate, data, seed
        self.calibration, self.example_input, self.recovery = calibration, example_input, recovery
        self.plans: list[Plan] = []
        self.done: list[PruningStep] = []
        self._reached = 0.0

    def prune(self, trainer: Trainer, epoch: int) -> float | None:
        """Bring the model to where the schedule wants it before this epoch; the score afterwards."""
        wanted = self.schedule(epoch + 1)
        budgeted = isinstance(self.method, Planned) and self.method.budget is not None
        if wanted <= self._reached and not budgeted:
            return None
        seed_epoch(self.seed, _STEP_SEEDS + epoch, self.data)
        old = trainer.model
        try:
            small = self.method(old, wanted)
        except TypeError as error:
            raise GraphPruneError(f"pruning failed: {error}; see options") from error
        if not isinstance(small, nn.Module):
            raise GraphPruneError(f"method: expected it to return the model, got {type(small).__name__}")
        plan = None
        if small is not old:
            plan = getattr(self.method, "plan", None)
            if self.recovery is not None and plan is not None:
                small = recover(old, plan, self.example_input, self.calibration, self.recovery).model
            if plan is not None:
                self.plans.append(plan)
        if isinstance(self.method, Channels) and epoch + 1 >= self.steps and all(plan.empty for plan in self.plans):
            tell("" if self.method.told else self.method.shortfall, self.method.strict)
        trainer.prune(small, plan)
        self._reached = wanted
        score = None if self.evaluate is None else self.evaluate(trainer.model)
        self.done.append(PruningStep(epoch + 1, None if budgeted else wanted, score))
        return score

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What has been done, and to `model`, as JSON."""
        widths = dict(self.method.widths) if isinstance(self.method, Channels) else {}
        return {
            "plans": [plan.to_dict() for plan in self.plans],
            "done": [dataclasses.asdict(step) for step in self.done],
            "reached": self._reached,
            "widths": widths,
            "masked": sorted(masks(model)),
        }

    def restore(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Cut and mask the trainer's model as it was; its values come from the checkpoint. Raises TypeError, ValueError
        and the like for what `state` cannot have returned."""
        self.plans = [Plan.from_dict(plan) for plan in state["plans"]]
        self.done = [
            PruningStep(counted(step["epoch"], self.steps), score(step["sparsity"]), score(step["score"]))
            for step in state["done"]
        ]
        self._reached = float(score(state["reached"]) or 0.0)
        widths, masked = state["widths"].items(), state["masked"]
        if not all(isinstance(name, str) for name in masked):
            raise TypeError("a masked parameter has no name")
        if isinstance(self.method, Channels):
            self.method.widths = {str(k): counted(v, 2**31) for k, v in widths}
        for plan in self.plans:
            trainer.prune(plan.apply(trainer.model), plan)
        weights = [weight for weight in find_weights(trainer.model) if weight.name in masked]
        if len(weights) != len(masked):
            raise ValueError("a masked parameter is missing")
        set_masks(trainer.model, {w.name: torch.ones_like(w.value, dtype=torch.bool) for w in weights})
