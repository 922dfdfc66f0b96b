"""What a budget limits, for the groups of one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from ...dependency.state import Mask
from ...errors import GraphPruneError
from ...plans.surgery import Fold
from .budget import Budget, Limit
from .budgets import BUDGETS, BudgetKind
from .costs import CostModel


class StairCost(CostModel, Protocol):
    """A cost that jumps at some widths; `stairs`: the part of `curve` that does."""

    def stairs(self, group: int, kept: Floats, fractions: Floats) -> Floats: ...


class Forecasts(Protocol):
    """Predicts latencies; `dense`: seconds of the original, `correction`: measured over predicted."""

    correction: float

    @property
    def dense(self) -> float: ...

    def cost(self, graph: DependencyGraph) -> StairCost: ...

    def predict(self, graph: DependencyGraph, gone: Mask) -> None: ...


def make_limits(
    budget: Budget | None,
    graph: DependencyGraph,
    model: nn.Module,
    folds: Sequence[Fold],
    forecast: Forecasts | None = None,
) -> list[Limit]:
    """The limits of `budget` (none without one); a fraction is of what `model` has before anything is done to it.

    `folds`: batch norms that the pruned network will not have. Groups are rebuilt when axes freeze, and limits with
    them.
    """
    if budget is None:
        return []
    out = []
    if budget.timed:
        assert forecast is not None
        most = budget.seconds(forecast.dense) / forecast.correction
        timed = forecast.cost(graph)
        out.append(Limit("latency, in seconds,", timed, most, timed.stairs, ",.4g"))
    for name, value in budget.limits().items():
        kind = BUDGETS.find(name)
        if not kind.timed:
            cost = kind.of(graph, model, folds)
            most = value * _full(kind, cost, graph, model, folds) if value <= 1 else float(value)
            out.append(Limit(name, cost, most, form=kind.form))
    return out


def _full(
    kind: BudgetKind, cost: CostModel, graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]
) -> float:
    """What the original costs: it still has its batch norms."""
    full = (kind.of(graph, model, ()) if folds else cost).full
    if not full > 0:
        raise GraphPruneError(
            f"budget: {kind.name} of this model are {full:{kind.form}}, so there is no fraction of it to keep; limit "
            f"something else"
        )
    return full
