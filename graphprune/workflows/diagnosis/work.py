"""Where the multiply-accumulates of a recorded run lie: over which axes its loops run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...dependency import DependencyGraph
from ...dependency.axes import loop_axes
from ...dependency.state import AxisMap
from ...tracing.work import runs_in_eval, term_macs, terms_of

Axes = list[tuple[int, AxisMap]]  # length and coordinates


@dataclasses.dataclass(frozen=True)
class Work:
    """`macs` multiply-accumulates, spread evenly over all combinations of indices of `axes` (and of axes that no
    channel lies on, which are left out)."""

    macs: int
    axes: Axes


def work_of(graph: DependencyGraph) -> Iterator[Work]:
    """The work of a run in eval mode; its parts add up to what `graphprune.count` counts."""
    for node in graph.trace.graph.nodes:
        if runs_in_eval(node):
            for term in terms_of(node) or ():
                found = loop_axes(graph.analysis, term)
                yield Work(term_macs(term), [(length, axis_map) for axis_map, length in found if axis_map])
