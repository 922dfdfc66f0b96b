"""`DependencyGraph`: what users see of the analysis."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from torch import nn

from ..errors import GraphPruneError
from ..support.doors import door
from ..tracing.names import operator_name
from ..tracing.pause import paused_collector
from ..tracing.trace import Trace, record_run
from .analysis import Analysis, analyse
from .build import axis_roles
from .configured import tied_by_configuration
from .dims import Root
from .drawing import as_dot, draw_dependencies
from .effects import Reason
from .grouping import Grouping, unproduced
from .groups import Group, Ints, Role
from .reparametrised import held_positions, plain
from .state import multiplicity


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Indices of a parameter axis that cannot be removed, and why."""

    parameter: str
    axis: int
    count: int
    length: int
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        part = "all" if self.count == self.length else f"{self.count} of {self.length}"
        why = "; ".join(map(str, self.reasons)) or "no operator produces or consumes it as channels"
        return f"{self.parameter} axis {self.axis}: {part} frozen: {why}"


class DependencyGraph:
    """Which slices of which parameters are one channel, and what cannot be removed.

    Made by `graphprune.trace`. `groups` lists what can be pruned; `explain` says, for one parameter, what each axis is
    tied to or why it is frozen; `to_networkx` gives the ties as a graph, `to_dot` and `draw` as a picture.
    """

    def __init__(self, analysis: Analysis) -> None:
        roles = axis_roles(analysis)
        held = analysis.freezing(unproduced(analysis, roles))
        self._hold(held, roles, Grouping.of(held, roles))

    def _hold(self, analysis: Analysis, roles: Mapping[Root, Role], grouping: Grouping) -> None:
        self._analysis, self._roles, self._grouping = analysis, roles, grouping
        self._groups = grouping.groups

    # -- contents

    @property
    def groups(self) -> tuple[Group, ...]:
        """Everything that can be pruned, in graph order."""
        return self._groups

    @property
    def trace(self) -> Trace:
        """The recorded run (`.trace.graph` is a `torch.fx.Graph` of ATen calls)."""
        return self._analysis.trace

    @property
    def analysis(self) -> Analysis:
        return self._analysis

    @property
    def roles(self) -> Mapping[Root, Role]:
        """What each axis of each parameter does."""
        return self._roles

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Every parameter axis with immovable indices, in graph order, with reasons."""
        out = []
        free = self._free_axes()
        for name, node in self.trace.parameters.items():
            for axis, length in enumerate(node.meta["val"].shape):
                if length > 1 and (name, axis) not in free:
                    found = self._frozen_axis(name, axis, length)
                    if found is not None:
                        out.append(found)
        return tuple(out)

    def _free_axes(self) -> set[Root]:
        """Axes of which every index can go by one of its coordinates (the usual case), found in one go."""
        layout = self._analysis.dims.layout()
        if not layout.roots:
            return set()
        free = layout.marked(~self._analysis.frozen(layout.position))
        whole = np.logical_and.reduceat(free, layout.starts[:-1])
        return {root for root, all_free in zip(layout.roots, whole.tolist(), strict=True) if all_free}

    def units(self, group: Group) -> Ints:
        """The component number of every unit of a group."""
        return self._grouping.parts[group.index].units

    # -- holding more

    def freezing(self, items: Iterable[tuple[Ints, Reason]]) -> DependencyGraph:
        """The same graph with more global positions held, each with a reason. This one stays as it is; what is equal is
        shared, groups that lose nothing among it. Without items, this graph itself."""
        analysis = self._analysis.freezing(items)
        if analysis is self._analysis:
            return self
        held = object.__new__(type(self))
        held._hold(analysis, self._roles, self._grouping.narrowed(analysis))
        return held

    # -- explanations

    def _frozen_axis(self, name: str, axis: int, length: int) -> Frozen | None:
        analysis = self._analysis
        axis_map = analysis.dims.roots.get((name, axis))
        if axis_map is None:
            kernel = Reason("kernel", "kernel positions are no channels")
            numbers = Reason("numbers", "whole numbers, used as they are: no channels")
            dtype = self.trace.parameters[name].meta["val"].dtype
            reason = kernel if dtype.is_floating_point or dtype.is_complex else numbers
            return Frozen(name, axis, length, length, (reason,))
        held = multiplicity(axis_map, length) == 0
        labels = []
        for d, v in axis_map.items():
            here = np.nonzero(v >= 0)[0]
            stuck = analysis.frozen(analysis.dims.offset[d] + v[here])
            if stuck.any():
                labels.append(analysis.dims.offset[d] + v[here[stuck]])
        # an index is immovable when none of its coordinates can go
        free = np.zeros(length, bool)
        for d, v in axis_map.items():
            here = np.nonzero(v >= 0)[0]
            free[here] |= ~analysis.frozen(analysis.dims.offset[d] + v[here])
        stuck_count = int((~free | held).sum())
        if not stuck_count:
            return None
        return Frozen(
            name, axis, stuck_count, length, self._reasons(np.unique(np.concatenate(labels)) if labels else None)
        )

    def _reasons(self, positions: Ints | None) -> tuple[Reason, ...]:
        """The statements that froze what these positions are tied to."""
        if positions is None:
            return ()
        which, sets = self._statements
        found = which[np.unique(self._analysis.tied[positions])]
        out: dict[str, Reason] = {}
        for index in found[np.sort(np.unique(found, return_index=True)[1])].tolist():
            for text, reason in sets[index].items():
                out.setdefault(text, reason)
        return tuple(out.values())[:6]

    @functools.cached_property
    def _statements(self) -> tuple[Ints, list[dict[str, Reason]]]:
        """Component number (of `Analysis.tied`) -> which set of statements freezes it, and these sets by text."""
        tied = self._analysis.tied
        which = np.zeros(int(tied.max(initial=-1)) + 1, np.int64)
        sets: list[dict[str, Reason]] = [{}]
        for frozen, reason in self._analysis.freezes:
            labels, text = np.unique(tied[frozen]), str(reason)
            before = which[labels]
            for index in np.unique(before).tolist():
                if text not in sets[index]:
                    which[labels[before == index]] = len(sets)
                    sets.append({**sets[index], text: reason})
        return which, sets

    def explain(self, parameter: str) -> str:
        """For each axis of a parameter: the group it belongs to and what it is tied to, or why it is frozen.

        Raises GraphPruneError for a name the model does not have.
        """
        name = self.trace.canonical(parameter)
        if name not in self.trace.parameters:
            if parameter in self.trace.aliases or parameter in self.trace.sources:
                return f"{parameter}: not used in the recorded run, so nothing is known of it and it stays as it is"
            raise GraphPruneError(f"explain: no parameter or buffer named {parameter!r}; see model.named_parameters()")
        shape = self.trace.parameters[name].meta["val"].shape
        lines = [f"{parameter} {tuple(shape)}" + self._other_name(parameter, name)]
        for axis, length in enumerate(shape):
            lines += self._explain_axis(name, axis, length)
        return "\n".join(lines)

    def _other_name(self, parameter: str, name: str) -> str:
        if name == parameter:
            return ""
        return f" ({name}, computed from it)" if parameter in self.trace.sources else f" (shared with {name})"

    def _explain_axis(self, name: str, axis: int, length: int) -> list[str]:
        if length == 1:
            return [f"  axis {axis} (1): nothing to remove"]
        lines = []
        for group in self._groups:
            mine = [m for m in group.members if m.parameter == name and m.axis == axis]
            if mine:
                others = [f"{m.parameter}[{m.axis}]" for m in group.members if m is not mine[0]]
                tied = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
                count = sum(m.positions.size for m in mine)
                share = "" if count == length else f", {count} of {length} indices"
                lines.append(
                    f"  axis {axis} ({length}): group {group.index}, {group.size} {group.kind}s{share}; "
                    f"tied to {tied or 'nothing else'}"
                )
        frozen = self._frozen_axis(name, axis, length)
        if frozen is not None:
            part = "frozen" if frozen.count == length else f"{frozen.count} of {length} frozen"
            why = "; ".join(map(str, frozen.reasons)) or "no operator uses it as channels"
            lines.append(f"  axis {axis} ({length}): {part}: {why}")
        return lines

    # -- as a graph

    def to_networkx(self) -> nx.MultiGraph:
        """Parameter axes as nodes ("name[axis]"), ties as edges.

        Node attributes: parameter, axis, length, groups (indices), frozen (count). Edge attributes: operation, source
        (the line of the user's code that ties the two).
        """
        graph = nx.MultiGraph()
        dims = self._analysis.dims
        of_axis: dict[tuple[str, int], list[int]] = defaultdict(list)
        for group in self._groups:
            for m in group.members:
                of_axis[(m.parameter, m.axis)].append(group.index)
        for (name, axis), _ in dims.roots.items():
            length = self.trace.parameters[name].meta["val"].shape[axis]
            frozen = self._frozen_axis(name, axis, length)
            graph.add_node(
                f"{name}[{axis}]",
                parameter=name,
                axis=axis,
                length=length,
                groups=sorted(set(of_axis[(name, axis)])),
                frozen=frozen.count if frozen else 0,
            )
        for node, effects in self._analysis.effects.items():
            seen: set[tuple[str, str]] = set()
            for union in effects.unions:
                if not len(union.coordinates):
                    continue
                ends = []
                for dim in (union.dim, union.other):
                    name, axis = dims.root_of[dim]
                    if (name, axis) not in dims.roots:
                        break  # a tensor that the model's code makes
                    ends.append(f"{name}[{axis}]")
                if len(ends) < 2:
                    continue
                pair = (min(ends), max(ends))
                if pair[0] != pair[1] and pair not in seen:
                    seen.add(pair)
                    graph.add_edge(*pair, operation=operator_name(node), source=str(node.meta.get("source") or ""))
        return graph

    def to_dot(self) -> str:
        """The ties in Graphviz form, one cluster per group."""
        return as_dot(self._groups, self.to_networkx())

    def draw(self, path: str | Path) -> Path:
        """Write a picture: `.dot` as text, anything matplotlib writes (`.svg`, `.png`, `.pdf`) as a drawing."""
        return draw_dependencies(self._groups, self.to_networkx(), path)

    def __repr__(self) -> str:
        return f"DependencyGraph({len(self._groups)} groups, {len(self.trace.parameters)} parameters)"


@door("model")
def trace(model: nn.Module, example_input: Any) -> DependencyGraph:
    """Record one run of `model` and find out which slices of which parameters are one channel.

    The model runs once, in eval mode without gradients, and is left exactly as it was. Weights that it computes from
    others (weight norm, spectral norm, parametrisations) stand there as the weights that they are. `example_input`: a
    tensor, a tuple of positional arguments or a dict of keyword arguments. Works on any device, `meta` included.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> [(g.name, g.size) for g in graphprune.trace(net, torch.randn(1, 3, 8, 8)).groups]
    [('0.weight[0]', 8)]

    Raises GraphPruneError when the model fails on the example input.
    """
    model = plain(model)
    with paused_collector():
        analysis = analyse(record_run(model, example_input, training_paths=True))
        graph = DependencyGraph(tied_by_configuration(model, analysis))
        return graph.freezing(held_positions(graph.analysis, model))
