"""Channels removed step by step, for a scheduler: each step is a plan made from the weights as they are then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..dependency import DependencyGraph, Group
from ..dependency.graph import trace
from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from ..importance.calibration.source import CalibrationSource
from ..planning.allocation import Kinds, chosen_groups
from ..planning.allocation.rounding import lost
from ..planning.by_width import stepped
from ..planning.layers import ignored_names
from ..planning.request import Decision, Request, takes_options
from ..planning.shortfall import hopeless, shortfall, tell
from ..planning.widths import plan_from_graph
from ..plans.data import GroupPlan
from ..plans.naming import in_users_names
from ..plans.plan import Plan
from ..plans.verification import verify as run_verification
from ..support.doors import door
from .ranking import check_sparsity

# Options of `plan` that mean nothing, or cannot be kept, where channels go in several steps.
NOT_IN_STEPS = {
    "max_ratio": "is of the original's widths, which later steps do not know; give ratios that are small enough",
    "output": "modules that were replaced at one step are none to be replaced at the next; use prune",
}
NOT_OF_CHANNELS = {
    **NOT_IN_STEPS,
    "ratio": "it is the sparsity of each step",
    "budget": "channels go by the sparsity of each step; graphprune.prune_gradually approaches a budget",
    "fold_bn": "batch norms stay, as training goes on; graphprune.fold_conv_bn folds them afterwards",
    "layer_criterion": "no layers go",
}


class Channels:
    """A method for `Scheduler` that removes channels: a plan at every step, made from the weights as they are then.

    `sparsity` is the fraction of every group's *original* channels that is gone (of all of them together where the
    scope is not "local"), however many steps lead there. The options are those of `graphprune.plan`, unknown ones a
    GraphPruneError; batch norms are not folded, as training goes on. With `verify` (default) every step is checked like
    `graphprune.prune` does it. `plan` is the plan of the latest step.

    Where options (`round_to`, `min_channels`) keep every group whole, whatever the sparsity, that is a
    GraphPruneWarning, once, or with `strict` a GraphPruneError. A model without channels to remove is an error.
    """

    @takes_options(NOT_OF_CHANNELS)
    def __init__(self, example_input: Any, *, verify: bool = True, **options: Any) -> None:
        self.example_input = example_input
        self.request = Request(0.0, fold_bn=False, **options)
        if self.request.strategy.kinds is None:
            raise GraphPruneError(
                f"Channels: granularity={self.request.granularity!r} goes as a whole; graphprune.prune_gradually takes "
                f"it in steps"
            )
        self.note = ""  # what the target likes
        self.verify = verify
        self.widths: dict[str, int] = {}
        self.plan: Plan | None = None
        self.shortfall = ""  # why the latest plan removes nothing, where it does
        self.told = False

    @door("model")
    def __call__(self, model: nn.Module, sparsity: float) -> nn.Module:
        """A smaller copy of the model."""
        # the models of later calls are made of copies of this one
        self.request = self.request.but(ignore=ignored_names(self.request.ignore, model))
        self.request = self.request.with_data_for(model, self.example_input)
        if self.request.target is not None:  # found out once
            asked, self.note = stepped(model, self.example_input, self.request)
            self.request = asked.but(target=None)
        users, model = model, plain(model)
        graph = trace(model, self.example_input)
        groups = [g for g, c in zip(graph.groups, chosen_groups(graph, self._kinds), strict=True) if c]
        if not groups:
            raise GraphPruneError(
                f"Channels: this model has no channels to remove (granularity={self.request.granularity!r}); see "
                f"graphprune.doctor"
            )
        if not self.widths:
            self.widths = {_key(g): g.size for g in groups}
        request = self.request.but(ratio=self._relative(groups, check_sparsity(sparsity)))
        source = CalibrationSource.of(model, self.example_input, request.data, request.loss_fn)
        graph, decided = plan_from_graph(model, graph, request, source=source, steady=True)
        self._note(decided, request.but(ratio=sparsity), graph, {_key(g) for g in groups})
        decided = in_users_names(decided, model, users)
        small = decided.apply(users)
        if self.verify:
            run_verification(users, small, decided, self.example_input, graph=graph).raise_on_failure()
        self.plan = decided
        return small

    def _note(self, decided: Plan, request: Request, graph: DependencyGraph, chosen: set[str]) -> None:
        """Find out whether the sparsity so far came to nothing, and say at once what no sparsity can change."""
        self.shortfall = ""
        if not decided.empty or not (self.plan is None or self.plan.empty):
            return
        assert isinstance(request.ratio, float)
        left = 1 - request.ratio
        asked = [(g, left * g.size if _key(g) in chosen else None) for g in decided.groups]
        wanted = dataclasses.replace(decided, groups=tuple(dataclasses.replace(g, asked=n) for g, n in asked))
        self.shortfall = shortfall(Decision(wanted, request, graph, self.note))
        if self.shortfall and not self.told and hopeless(wanted, request):
            self.told = True
            tell(self.shortfall, request.strict)

    @property
    def _kinds(self) -> Kinds:
        kinds = self.request.strategy.kinds
        assert kinds is not None
        return kinds

    def _relative(self, groups: Sequence[Group], sparsity: float) -> float | dict[str, float]:
        """Fractions of what is left now that leave the wanted fraction of what there was."""
        full = [self.widths.get(_key(g), g.size) for g in groups]
        if self.request.scope != "local":
            left, all_of_them = sum(g.size for g in groups), sum(full)
            return max(0.0, 1 - (all_of_them - lost(sparsity, all_of_them)) / left)
        out = {}
        for group, size in zip(groups, full, strict=True):
            if _key(group) not in self.widths and group.kind.is_feature:
                continue  # only one of its heads is left, and they were what goes
            keep = max(1, size - lost(sparsity, size))
            out[_producer(group)] = max(0.0, 1 - keep / group.size)
        return out


def _producer(group: Group) -> str:
    return next((m.parameter for m in group.members if m.role == "out"), group.members[0].parameter)


def _key(group: Group | GroupPlan) -> str:
    return f"{group.name} {group.kind}"
