"""Forecasts for a network that has lost some of its layers, from what was measured on the whole one."""

from __future__ import annotations

import dataclasses

from ...dependency import DependencyGraph
from ...dependency.state import Mask
from .context import Context
from .costs import LatencyCosts
from .forecast import Forecast


class ShorterForecast:
    """The forecast `whole` of a network, for that network without some layers: times are on the same scale, and
    `dense` is still the time of the network with all its layers.

    `graph`: of the network with all its layers. What is predicted is noted in `whole`.
    """

    def __init__(self, whole: Forecast, graph: DependencyGraph) -> None:
        self.whole, self.correction = whole, whole.correction
        self._full = whole.cost(graph)

    @property
    def dense(self) -> float:
        """Seconds of a call of the dense network."""
        return self.whole.dense

    def cost(self, graph: DependencyGraph) -> LatencyCosts:
        """The cost model of the network in `graph`."""
        rough = LatencyCosts(graph, self.whole.table, self.whole.context)
        context = without_layers(self.whole.context, self._full, rough)
        return LatencyCosts(graph, self.whole.table, context)

    def predict(self, graph: DependencyGraph, gone: Mask) -> None:
        """Remember what these removals are expected to cost."""
        self.whole.predicted = self.cost(graph).exact(gone)


def without_layers(context: Context, whole: LatencyCosts, part: LatencyCosts) -> Context:
    """The context of a part of a network, from that of the whole: its computations take what they took in the whole,
    work on elements shrinks with their number, and what is the same at every width with the number of calls.

    `whole`, `part`: the cost models of both, made with `context`; of `part` only what it is made of is read.
    """
    light = context.light * part.elements / whole.elements if whole.elements else context.light
    fixed = context.fixed * part.calls / max(whole.calls, 1)
    share = (part.heavy + light) / max(whole.heavy + context.light, 1e-12)
    return dataclasses.replace(context, wall=fixed + (context.wall - context.fixed) * share, light=light, fixed=fixed)


__all__ = ["ShorterForecast", "without_layers"]
