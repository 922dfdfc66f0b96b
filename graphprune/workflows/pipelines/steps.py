"""Pruning in the course of a training: when a schedule asks for more, a method brings the model there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import GraphPruneError
from ...importance import resolve_criterion
from ...planning.allocation import Budget
from ...planning.request import OPTIONS, Request, check_names, strategy_of
from ...planning.shortfall import shortfall, tell
from ...plans.plan import Plan
from ...plans.verification import verify
from ...recovery import BlockFit, recover
from ...recovery.training.loop import Trainer
from ...recovery.training.runs import Score
from ...sparsity import Channels, gradient, magnitude, masks, set_masks
from ...sparsity.scheduler import Method
from ...sparsity.weights import find_weights
from ...support.randomness import seed_epoch
from ...support.runs import counted, score
from ...support.types import LossFunction

# Methods that set masks: the function, and which of its arguments the pipeline gives.
_MASKING: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "magnitude": (magnitude, ("model", "sparsity")),
    "gradient": (gradient, ("model", "data", "loss_fn", "sparsity")),
}
METHODS = ("channels", "layers", *_MASKING)
# Options of `plan` that the pipeline gives itself.
_GIVEN = {
    "ratio": "give the pipeline its sparsity",
    "budget": "give it to the pipeline itself",
    "fold_bn": "batch norms stay, as training goes on; graphprune.fold_conv_bn folds them afterwards",
}
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
    """A method that plans once: for the request's budget, whatever the sparsity asked for, or for that ratio."""

    def __init__(self, example_input: Any, request: Request, verify: bool) -> None:
        self.example_input, self.request, self.verify = example_input, request, verify
        self.plan: Plan | None = None

    def __call__(self, model: nn.Module, sparsity: float) -> nn.Module:
        """A smaller copy of the model."""
        asked = self.request if self.request.budget is not None else self.request.but(ratio=sparsity)
        found = asked.decide(model, self.example_input)
        tell(shortfall(found), asked.strict)
        self.plan = found.plan
        small = self.plan.apply(model)
        if self.verify:
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
    if method not in ("channels", "layers") and budget is not None:
        raise GraphPruneError("budget: only methods 'channels' and 'layers' work towards one; give a sparsity instead")
    if callable(method):
        if chosen:
            raise GraphPruneError("options: are those of a named method; build yours into the function")
        return method
    if method in ("channels", "layers"):
        return _planning(method, example_input, budget, chosen, calibration, loss_fn, seed, strict)
    if method in _MASKING:
        function, given = _MASKING[method]
        check_names(chosen, [n for n in inspect.signature(function).parameters if n not in given], "options")
        if function is magnitude:
            return lambda model, sparsity: magnitude(model, sparsity, **chosen)
        return lambda model, sparsity: gradient(model, calibration, loss_fn, sparsity, **chosen)
    known = ", ".join(map(repr, METHODS))
    raise GraphPruneError(f"method: expected one of {known} or a function (model, sparsity) -> model, got {method!r}")


def _planning(
    method: str,
    example_input: Any,
    budget: Budget | None,
    options: Mapping[str, Any],
    calibration: Any,
    loss_fn: LossFunction | None,
    seed: int,
    strict: bool,
) -> Method:
    """Pruning by plans: once, or channels step by step."""
    check_names(options, [*(name for name in OPTIONS if name not in _GIVEN), "verify"], "options", _GIVEN)
    chosen: dict[str, Any] = {"strict": strict, "seed": seed, **options}
    checked = bool(chosen.pop("verify", True))
    if method == "layers":
        chosen = {"granularity": "layer", **chosen}
    if strategy_of(chosen.get("granularity", "auto")).kinds is None:
        chosen = {"data": calibration, "loss_fn": loss_fn, **chosen}
    else:
        needs = resolve_criterion(chosen.get("criterion")).needs
        chosen = {**_needed(needs, calibration, loss_fn), **chosen}
    if method == "channels" and budget is None:
        return Channels(example_input, verify=checked, **chosen)
    request = Request(budget=budget, fold_bn=False, **chosen)
    if method == "layers" and request.strategy.kinds is not None:
        raise GraphPruneError(
            f"options: method='layers' leaves things out as a whole, and granularity={request.granularity!r} does not; "
            f"use method='channels'"
        )
    return Planned(example_input, request, checked)


def _needed(needs: str | None, data: Any, loss_fn: LossFunction | None) -> dict[str, Any]:
    """What a criterion needs."""
    return {} if needs is None else {"data": data} if needs != "loss" else {"data": data, "loss_fn": loss_fn}


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
        recovery: str | BlockFit | None,
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
        budgeted = isinstance(self.method, Planned) and self.method.request.budget is not None
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
            tell("" if self.method.told else self.method.shortfall, self.method.request.strict)
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
