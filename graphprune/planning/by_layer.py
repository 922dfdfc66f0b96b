"""Granularities of layers and branches: alone, or together with widths within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..importance.layers import check_layer_criterion
from ..plans.plan import Plan
from ..tracing.example import ExampleInput
from ..tracing.pause import paused_collector
from .allocation import Budget, Forecasts
from .by_width import Made, Widths, narrowed, on_target
from .layers import check_alone, ignored_names, plan_layers
from .layers_and_widths import JointPlanner
from .request import GRANULARITIES, Decision, Granularity, Request


class WholeLayers(Granularity):
    """Layers go as a whole, or with `branches` the residual branches inside them."""

    def __init__(self, name: str, units: str, branches: bool) -> None:
        self.name, self.units, self.branches = name, units, branches

    def check(self, request: Request) -> None:
        """Raise GraphPruneError for ratios by name, limits that no layer has, and criteria that rank no layers."""
        check_alone(request)
        check_layer_criterion(request.criterion, request.data, self.branches)

    def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
        """The plan for a model."""
        return self.further(model, example, request, ())

    def further(self, model: nn.Module, example: Any, request: Request, before: Sequence[Plan]) -> Decision:
        """The plan for a model that has lost some already."""
        gone = sum(len(plan.layers) for plan in before)
        with paused_collector():
            return Decision(plan_layers(model, example, request, self.branches, gone), request)

    def beside(self, other: Granularity) -> Granularity | None:
        """Layers and widths."""
        return LayersAndWidths(self, other) if isinstance(other, Widths) else None


class LayersAndWidths(Granularity):
    """Layers go, and what stays gets narrower, within a budget."""

    ranks_layers = True

    def __init__(self, layers: WholeLayers, widths: Widths) -> None:
        self.layers, self.widths, self.kinds = layers, widths, widths.kinds

    def check(self, request: Request) -> None:
        """Raise GraphPruneError without a budget, and for criteria that rank no layers or no units."""
        if request.budget is None:
            whole = self.layers.name
            raise GraphPruneError(
                f"granularity: {whole!r} and widths at once need a budget, such as budget=Budget(macs=0.5), which "
                f"decides how many go and how wide the others stay; with ratios, prune twice: "
                f"prune(prune(model, x, 0.3, granularity={whole!r}), x, 0.3)"
            )
        self.widths.check(request)
        check_layer_criterion(request.layer_criterion, request.data, self.layers.branches)

    def decide(self, model: nn.Module, example: Any, request: Request) -> Decision:
        """The plan for a model."""
        names = ignored_names(request.ignore, model)

        def making(asked: Request) -> JointPlanner:
            def narrow(small: nn.Module, budget: Budget, forecast: Forecasts | None, data: Any) -> Made:
                return narrowed(small, example, asked.but(budget=budget, ignore=names, data=data), forecast)

            return JointPlanner(model, ExampleInput.of(example), asked, self.layers.branches, narrow)

        return on_target(model, example, request, making)

    def beside(self, other: Granularity) -> Granularity | None:
        """More widths."""
        widths = self.widths.beside(other)
        return LayersAndWidths(self.layers, widths) if isinstance(widths, Widths) else None


GRANULARITIES.add("layer", WholeLayers("layer", "layers", branches=False))
GRANULARITIES.add("branch", WholeLayers("branch", "branches", branches=True))

__all__ = ["LayersAndWidths", "WholeLayers"]
