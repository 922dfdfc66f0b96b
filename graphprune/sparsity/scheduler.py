"""One scheduler for masks and for plans: it asks a schedule how much, and a method to do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import GraphPruneError
from ..plans.plan import Plan
from ..recovery import carry_optimizer
from ..support.doors import door
from .channels import Channels
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
