"""What a budget limits, for the groups of one network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from ...dependency import DependencyGraph
from ...dependency.axes import Floats
from ...dependency.state import Mask
from ...plans.surgery import Fold
from .budget import Budget, Limit
from .costs import CostModel, mac_costs, parameter_costs
from .memory import MemoryCosts


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
    makers: dict[str, Callable[[], tuple[CostModel, float]]] = {
        "macs": lambda: _with_full(mac_costs(graph)),
        "memory": lambda: _memory(graph, model, folds),
        "params": lambda: (parameter_costs(graph, model, folds), float(sum(p.numel() for p in model.parameters()))),
    }
    out = []
    if budget.timed:
        assert forecast is not None
        most = budget.seconds(forecast.dense) / forecast.correction
        timed = forecast.cost(graph)
        out.append(Limit("latency, in seconds,", timed, most, timed.stairs))
    for name, value in budget.limits().items():
        if name not in makers:
            continue
        cost, dense = makers[name]()
        out.append(Limit(name, cost, value * dense if value <= 1 else float(value)))
    return out


def _memory(graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> tuple[CostModel, float]:
    """The original still has its batch norms."""
    return MemoryCosts(graph, model, folds), MemoryCosts(graph, model, ()).full


def _with_full(cost: CostModel) -> tuple[CostModel, float]:
    return cost, cost.full
