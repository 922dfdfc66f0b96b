"""What channels are for: the width of a residual stream or of embeddings, or the hidden width of an MLP.

Found from the recorded calls alone, never from names. A residual stream is what `x + f(x)` is added up in, where f
contains a layer; a hidden width lies between layers that mix channels at one place and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from torch import fx

from ...tracing.operators import Kind, is_layer, kind_of, products_of
from ..analysis import Analysis
from ..groups import GroupKind, Ints, Member
from ..state import State

# Calls that are looked at between a weight and the layer that reads it
_FAR = 64


def stream_components(analysis: Analysis) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which components (numbers in `Analysis.tied`) are the width of a residual stream, and which of looked up
    embeddings."""
    residual: list[Ints] = []
    looked_up: list[Ints] = []
    order = {node: i for i, node in enumerate(analysis.trace.graph.nodes)}
    for node in analysis.trace.calls.get(Kind.LOOKUP, ()):
        looked_up += _positions(analysis, analysis.state(node), (len(analysis.state(node).shape) - 1,))
    for node in analysis.trace.calls.get(Kind.POINTWISE, ()):
        if analysis.trace.lines[node].sums:
            state = analysis.state(node)
            axes = tuple(a for a, axis_map in state.axes.items() if axis_map)
            if axes and _is_residual(node, order):
                residual += _positions(analysis, state, axes)
    return analysis.ties_of(residual), analysis.ties_of(looked_up)


def _positions(analysis: Analysis, state: State, axes: Iterable[int]) -> list[Ints]:
    return [analysis.dims.positions(dim, vector) for axis in axes for dim, vector in state.axis(axis).items()]


def _is_residual(node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """One operand of a sum was computed from the other, by way of a layer."""
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(operands) < 2:
        return False
    skip, branch = sorted(operands, key=order.__getitem__)
    return skip is not branch and _through_layer(skip, branch, order)


def _through_layer(start: fx.Node, end: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a layer lies on a way from `start` to `end`. Only calls between the two are looked at."""
    between: list[fx.Node] = []
    seen, queue = {end}, [end]
    while queue:
        node = queue.pop()
        between.append(node)
        for source in node.all_input_nodes:
            if source not in seen and order[source] > order[start] and source.op == "call_function":
                seen.add(source)
                queue.append(source)
    reached: dict[fx.Node, bool] = {start: False}  # with a layer on the way, or not yet
    for node in sorted(between, key=order.__getitem__):
        came = [reached[source] for source in node.all_input_nodes if source in reached]
        if came:
            reached[node] = any(came) or is_layer(node)
    return reached.get(end, False)


class ChannelUses:
    """Tells plain channels apart by the layers that make and read them."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.residual, self.looked_up = stream_components(analysis)
        self._mixes: dict[str, bool] = {}

    def kind(self, members: Iterable[Member], units: Ints) -> GroupKind:
        """What to call the channels with these members and components; see `GroupKind`."""
        # components of positions that can go have the same numbers with and without freezing
        if self.residual[units].all():
            return GroupKind.RESIDUAL_CHANNEL
        if self.looked_up[units].all():
            return GroupKind.EMBEDDING_CHANNEL
        ends = {"out": 0, "in": 0}
        for member in members:
            role = member.role
            if role not in ("out", "in") or self._is_depthwise(member):
                continue
            flattened = role == "in" and member.positions.shape[1] > 1
            if flattened or not self._mixes_at_one_place(member.parameter):
                return GroupKind.CHANNEL
            ends[role] += 1
        return GroupKind.MLP_CHANNEL if all(ends.values()) else GroupKind.CHANNEL

    def _users(self, parameter: str) -> set[Kind]:
        """The kinds of the layers and lookups that read a weight, also one that is transposed or scaled before."""
        found: set[Kind] = set()
        queue = [self.analysis.trace.parameters[parameter]]
        seen = set(queue)
        while queue and len(seen) < _FAR:
            for user in queue.pop().users:
                kind = kind_of(user)
                if kind is not None and (kind is Kind.LOOKUP or is_layer(user)):
                    found.add(_as_built_in(user, kind))
                elif user not in seen:
                    seen.add(user)
                    queue.append(user)
        return found

    def _is_depthwise(self, member: Member) -> bool:
        shape = self.analysis.trace.parameters[member.parameter].meta["val"].shape
        return len(shape) > 2 and shape[1] == 1 and Kind.CONVOLUTION in self._users(member.parameter)

    def _mixes_at_one_place(self, parameter: str) -> bool:
        """A layer without kernel positions: a Linear, a 1 x 1 convolution, a matrix per expert. Not a recurrent one."""
        if parameter not in self._mixes:
            shape = self.analysis.trace.parameters[parameter].meta["val"].shape
            users = self._users(parameter)
            slides = Kind.CONVOLUTION in users and any(n > 1 for n in shape[2:])
            self._mixes[parameter] = not slides and not users & {Kind.RECURRENT, Kind.LOOKUP}
        return self._mixes[parameter]


def _as_built_in(node: fx.Node, kind: Kind) -> Kind:
    """The kind of a call; of a user's operator the one that it is like."""
    if kind is not Kind.DECLARED:
        return kind
    return Kind.CONVOLUTION if any(product.slides for product in products_of(node)) else Kind.CONTRACTION
