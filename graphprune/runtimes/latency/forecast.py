"""What the allocator asks about latency: the cost model of one network on one target."""

from __future__ import annotations

import dataclasses

from torch import fx

from ...dependency import DependencyGraph
from ...dependency.axes import Axes
from ...dependency.state import Mask
from ...errors import GraphPruneError
from ..profiles import Profile
from .context import Context, make_context
from .costs import LatencyCosts, running
from .kernels import Sample
from .table import LatencyTable
from .units import Unit, units_of


@dataclasses.dataclass
class Forecast:
    """`correction`: measured over predicted, as far as it is known. `predicted`: seconds, without the correction, of
    the last plan that was made."""

    table: LatencyTable
    context: Context
    correction: float = 1.0
    predicted: float = 0.0

    @property
    def dense(self) -> float:
        """Seconds of a call of the dense network."""
        return self.context.wall

    def cost(self, graph: DependencyGraph) -> LatencyCosts:
        return LatencyCosts(graph, self.table, self.context)

    def predict(self, graph: DependencyGraph, gone: Mask) -> None:
        """Remember what these removals are expected to cost."""
        self.predicted = self.cost(graph).exact(gone)


def network_units(graph: DependencyGraph) -> list[Unit]:
    """The network's computations, one entry per call."""
    nodes: list[fx.Node] = running(graph)
    return units_of(nodes, Axes(graph))[0]


def measured_context(graph: DependencyGraph, table: LatencyTable, run: Profile) -> Context:
    """The context of the network in `graph` from a run of it."""
    if table.meter is None:
        raise GraphPruneError("latency table: it was brought from elsewhere and cannot measure here")
    samples: list[Sample] = [u.sample for u in network_units(graph)]
    table.ensure(samples)
    alone = {s: table.points[s.kernel][s.lengths] for s in samples}
    return make_context(run, samples, table.meter, alone)
