"""One scheduler for masks and for plans: it asks a schedule how much, and a method to do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..dependency import DependencyGraph, Group
from ..dependency.graph import trace
from ..errors import GraphPruneError
from ..importance import resolve_criterion
from ..importance.calibration.source import CalibrationSource
from ..planning.allocation import Settings
from ..planning.allocation.selection import chosen_groups
from ..planning.allocation.steps import RoundTo, nearest
from ..planning.layers import ignored_names
from ..planning.request import Criterionlike
from ..planning.shortfall import hopeless, shortfall, tell
from ..planning.widths import plan_from_graph
from ..plans.data import GroupPlan
from ..plans.plan import Plan
from ..plans.verification import verify as run_verification
from ..recovery import carry_optimizer
from ..support.doors import door
from ..support.types import Ignore, LossFunction
from ..tracing.matching import items_of
from .magnitudes import magnitude
from .ranking import check_sparsity

Method = Callable[[nn.Module, float], nn.Module]


class Scheduler:
    """Prunes a model gradually while it is trained.

    - `schedule`: step -> sparsity, from `graphprune.sparsity.schedule` or any function that never falls.
    - `method(model, sparsity)`: brings the model to a sparsity and returns it. The default is `magnitude`; use
      `functools.partial(magnitude, scope="layer")` for options, a lambda for `gradient` or `blocks`, and `Channels` for
      structured pruning.

    - `optimizer`: the one that trains the model. With `Channels` it is made to train the smaller model at every step,
      its state cut as the parameters are (`graphprune.carry_optimizer`).

    Call `step()` after each optimiser step (or epoch) and go on with the model it returns: masks are set in place,
    while structured pruning returns a smaller model (`changed` says when). The optimizer stays the same object::

        scheduler = Scheduler(model, schedule("cubic", 0.0, 0.9, 1000), optimizer=optimizer)
        for x, y in loader:
            ...
            model = scheduler.step()

    Attributes: `model`; `steps`, how many have been taken; `sparsity`, what the model has been brought to; `changed`,
    whether the last step changed the model. Raises GraphPruneError where the schedule leaves [0, 1) or falls.
    """

    @door("model", keep_wrapper=True)
    def __init__(
        self,
        model: nn.Module,
        schedule: Callable[[int], float],
        method: Method = magnitude,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not callable(schedule) or not callable(method):
            raise GraphPruneError("Scheduler: expected a schedule (step -> sparsity) and a method (model, sparsity)")
        self.model = model
        self.schedule = schedule
        self.method = method
        self.optimizer = optimizer
        self.steps = 0
        self.sparsity = 0.0
        self.changed = False
        self._follow()

    @door()
    def step(self) -> nn.Module:
        """Count a step, prune if the schedule asks for more, and return the model to go on with."""
        self.steps += 1
        self._follow()
        return self.model

    def _follow(self) -> None:
        wanted = check_sparsity(self.schedule(self.steps), f"schedule({self.steps})")
        if wanted < self.sparsity:
            raise GraphPruneError(
                f"schedule({self.steps}) is {wanted:g}, below the {self.sparsity:g} reached; what is pruned does not "
                f"come back"
            )
        self.changed = wanted > self.sparsity
        if self.changed:
            result = self.method(self.model, wanted)
            if not isinstance(result, nn.Module):
                raise GraphPruneError(f"method: expected it to return the model, got {type(result).__name__}")
            if self.optimizer is not None and result is not self.model:
                self._carry(self.optimizer, result)
            self.model, self.sparsity = result, wanted

    def _carry(self, optimizer: torch.optim.Optimizer, small: nn.Module) -> None:
        plan = getattr(self.method, "plan", None)
        if not isinstance(plan, Plan):
            raise GraphPruneError(
                "Scheduler: the method returned another model, and without a plan (an attribute `plan` of the method) "
                "the optimizer cannot follow; leave optimizer out and make a new one where `changed` says so"
            )
        carry_optimizer(optimizer, self.model, small, plan)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on later, beside the model's own state dict (masks are part of that)."""
        own = {"steps": self.steps, "sparsity": self.sparsity}
        return {**own, "widths": dict(self.method.widths)} if isinstance(self.method, Channels) else own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. The model must have been brought to that state by itself.

        Raises GraphPruneError for anything else than such a dict.
        """
        steps, sparsity = state.get("steps"), state.get("sparsity")
        if type(steps) is not int or steps < 0:
            raise GraphPruneError(f"Scheduler: the state has no number of steps, found {steps!r}")
        widths = state.get("widths")
        if isinstance(self.method, Channels) and not isinstance(widths, Mapping):
            raise GraphPruneError("Scheduler: the state is of unstructured pruning; it has no widths")
        self.sparsity = check_sparsity(sparsity, "Scheduler: sparsity in the state")
        self.steps, self.changed = steps, False
        if isinstance(self.method, Channels):
            self.method.widths = {str(k): int(v) for k, v in widths.items()}  # type: ignore[union-attr]


class Channels:
    """A method for `Scheduler` that removes channels: a plan at every step, made from the weights as they are then.

    `sparsity` is the fraction of every group's *original* channels that is gone (of all of them together where the
    scope is not "local"), however many steps lead there. The arguments are those of `graphprune.plan`; batch norms are
    not folded, as training goes on. With `verify` (default) every step is checked like `graphprune.prune` does it.
    `plan` is the plan of the latest step.

    Where options (`round_to`, `min_channels`) keep every group whole, whatever the sparsity, that is a
    GraphPruneWarning, once, or with `strict` a GraphPruneError. A model without channels to remove is an error.
    """

    def __init__(
        self,
        example_input: Any,
        *,
        ignore: Ignore = (),
        scope: str = "local",
        criterion: Criterionlike | None = None,
        round_to: RoundTo = "auto",
        min_channels: int = 1,
        granularity: str | Sequence[str] = "auto",
        seed: int = 0,
        verify: bool = True,
        data: Any = None,
        loss_fn: LossFunction | None = None,
        strict: bool = False,
    ) -> None:
        self.example_input = example_input
        self.ignore = items_of(ignore, "ignore")
        self.settings = Settings(0.0, scope, round_to, min_channels, granularity, steady=True)
        self.settings.check()
        self.criterion = resolve_criterion(criterion)
        self.criterion.check_data(data, loss_fn)
        self.data, self.loss_fn = data, loss_fn
        self.seed = seed
        self.verify = verify
        self.widths: dict[str, int] = {}
        self.strict = strict
        self.plan: Plan | None = None
        self.shortfall = ""  # why the latest plan removes nothing, where it does
        self.told = False

    @door("model")
    def __call__(self, model: nn.Module, sparsity: float) -> nn.Module:
        """A smaller copy of the model."""
        self.ignore = ignored_names(self.ignore, model)  # the models of later calls are made of copies of this one
        graph = trace(model, self.example_input)
        groups = [g for g, c in zip(graph.groups, chosen_groups(graph, self.settings.granularity), strict=True) if c]
        if not groups:
            kinds = self.settings.granularity
            raise GraphPruneError(
                f"Channels: this model has no channels to remove (granularity={kinds!r}); see graphprune.doctor"
            )
        if not self.widths:
            self.widths = {_key(g): g.size for g in groups}
        ratio = self._relative(groups, check_sparsity(sparsity))
        settings = dataclasses.replace(self.settings, ratio=ratio)
        source = CalibrationSource.of(model, self.example_input, self.data, self.loss_fn)
        graph, decided = plan_from_graph(
            model, graph, settings, self.criterion, ignore=self.ignore, fold_bn=False, seed=self.seed, source=source
        )
        self._note(decided, dataclasses.replace(settings, ratio=sparsity), graph, {_key(g) for g in groups})
        small = decided.apply(model)
        if self.verify:
            run_verification(model, small, decided, self.example_input, graph=graph).raise_on_failure()
        self.plan = decided
        return small

    def _note(self, decided: Plan, settings: Settings, graph: DependencyGraph, chosen: set[str]) -> None:
        """Find out whether the sparsity so far came to nothing, and say at once what no sparsity can change."""
        self.shortfall = ""
        if not decided.empty or not (self.plan is None or self.plan.empty):
            return
        left = 1 - float(settings.ratio)  # type: ignore[arg-type]
        asked = [(g, left * g.size if _key(g) in chosen else None) for g in decided.groups]
        wanted = dataclasses.replace(decided, groups=tuple(dataclasses.replace(g, asked=n) for g, n in asked))
        self.shortfall = shortfall(wanted, settings, None, graph)
        if self.shortfall and not self.told and hopeless(wanted, settings):
            self.told = True
            tell(self.shortfall, self.strict)

    def _relative(self, groups: Sequence[Group], sparsity: float) -> float | dict[str, float]:
        """Fractions of what is left now that leave the wanted fraction of what there was."""
        full = [self.widths.get(_key(g), g.size) for g in groups]
        if self.settings.scope != "local":
            left, all_of_them = sum(g.size for g in groups), sum(full)
            return max(0.0, 1 - (all_of_them - nearest(sparsity * all_of_them)) / left)
        out = {}
        for group, size in zip(groups, full, strict=True):
            if _key(group) not in self.widths and group.kind.is_feature:
                continue  # only one of its heads is left, and they were what goes
            keep = max(1, size - nearest(sparsity * size))
            out[_producer(group)] = max(0.0, 1 - keep / group.size)
        return out


def _producer(group: Group) -> str:
    return next((m.parameter for m in group.members if m.role == "out"), group.members[0].parameter)


def _key(group: Group | GroupPlan) -> str:
    return f"{group.name} {group.kind}"
