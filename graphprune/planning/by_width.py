"""Granularities of widths: which kinds of groups get narrower, and how that becomes a plan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ..dependency import DependencyGraph, GroupKind
from ..dependency.graph import trace
from ..importance import resolve_criterion
from ..importance.calibration.source import CalibrationSource
from ..plans.plan import Plan
from ..plans.rewriting import Rewriter
from ..runtimes.latency import Target
from ..support.progress import stage
from ..support.suggestions import check_choice
from ..tracing.pause import paused_collector
from .allocation import Forecasts, Kinds
from .allocation.kinds import CHANNELS, FEATURES
from .request import GRANULARITIES, Decision, Granularity, Request
from .widths import plan_once, settings_of
from .within_latency import plan_within, width_step

# A forecast of latencies, or None -> a graph and its plan
Made = tuple[DependencyGraph, Plan]
Maker = Callable[[Any], Made]


@dataclasses.dataclass(frozen=True)
class Widths(Granularity):
    """Groups of these kinds get narrower."""

    kinds: Kinds = dataclasses.field(default_factory=Kinds)

    def check(self, request: Request) -> None:
        """Raise GraphPruneError for unknown criteria, and those that lack what they need."""
        resolve_criterion(request.criterion).check_data(request.data)

    def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
        """The plan for a model."""
        return on_target(model, example, request, lambda asked: functools.partial(narrowed, model, example, asked))

    def beside(self, other: Granularity) -> Granularity | None:
        """Groups of both, unless one is "auto", which is all there are."""
        if not isinstance(other, Widths) or self.kinds.auto or other.kinds.auto:
            return None
        return Widths(self.kinds | other.kinds)


def widths(*kinds: str, made_by: tuple[int, int] | None = None) -> Widths:
    """A granularity of all groups of these kinds, or of channels made only by weights of so many axes, from - to.

    Raises GraphPruneError for a kind that no group has.
    """
    for kind in kinds:
        check_choice("kind of groups", kind, tuple(GroupKind))
    return Widths(Kinds(frozenset(map(GroupKind, kinds)), frozenset() if made_by is None else frozenset((made_by,))))


GRANULARITIES.add("auto", widths())
GRANULARITIES.add("channels", widths(*CHANNELS))
GRANULARITIES.add("mlp", widths(GroupKind.MLP_CHANNEL))
GRANULARITIES.add("embedding", widths(GroupKind.RESIDUAL_CHANNEL, GroupKind.EMBEDDING_CHANNEL))
GRANULARITIES.add("heads", widths(GroupKind.HEAD))
GRANULARITIES.add("head features", widths(*FEATURES))
GRANULARITIES.add("qk features", widths(GroupKind.QK_FEATURE))
GRANULARITIES.add("v features", widths(GroupKind.V_FEATURE))
# textbook names for channels by what makes them: weights with kernels, rows of weights with two axes
GRANULARITIES.add("filters", widths(made_by=(3, 5)))
GRANULARITIES.add("neurons", widths(made_by=(2, 2)))


def on_target(model: nn.Module, example: Any, request: Request, making: Callable[[Request], Maker]) -> Decision:
    """The decision of a maker of plans, on the target where one is named or latency is limited."""
    timed = request.budget is not None and request.budget.timed
    if request.target is None and not timed:
        graph, plan = making(request)(None)
        return Decision(plan, request, graph)
    request, note = stepped(model, example, request)
    if request.budget is not None and timed:
        graph, plan = plan_within(
            model, example, Target.of(request.target), request.budget.seconds, making(request)
        )
    else:
        graph, plan = making(request)(None)
    return Decision(plan, request, graph, note)


def stepped(model: nn.Module, example: Any, request: Request) -> tuple[Request, str]:
    """The request with widths that the target likes, and what to say where they leave nothing."""
    step = 1 if request.rounding.auto else int(request.round_to)
    if request.budget is None or not request.budget.timed:  # else the steps are looked up with the times
        step = math.lcm(step, width_step(model, example, Target.of(request.target)))
    return request.but(round_to=step), f"{step} is what the target likes" if step > 1 else ""


def narrowed(model: nn.Module, example: Any, request: Request, forecast: Forecasts | None) -> Made:
    """The graph of a model and the plan of its widths."""
    with paused_collector():
        source = CalibrationSource.of(model, example, request.data, request.loss_fn)
        rewriter = None if request.output == "module" else Rewriter(model, example, request.output)
        settings = settings_of(request)
        while True:  # every round rewrites one module more, or gives one up
            with stage("tracing"):
                graph = trace(model, example) if rewriter is None else rewriter.graph()
            found = plan_once(model, graph, request, settings, source, rewriter, forecast)
            if found is not None:
                held, plan = found
                return held, dataclasses.replace(plan, output=request.output)


__all__ = ["Made", "Maker", "Widths", "narrowed", "on_target", "stepped", "widths"]
