"""Recurrent layers, analysed as whole calls."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx, nn

from ...tracing.names import operator_name
from ...tracing.operators import Cells
from ...tracing.origin import TensorSize
from ...tracing.recorder import Guard
from ..context import NodeContext, Result
from ..state import AxisMap, State, concatenate
from .registry import line_of, rule

_HELD = "hidden width of a recurrent layer"


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One layer in one direction; `hidden` and `out` are the axes of its memory and of what it gives (projected)."""

    hidden: AxisMap
    width: int
    out: AxisMap
    out_width: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments of a recurrent call, in either form: (x, hx, ...) or (data, batch sizes, hx, ...)."""

    x: fx.Node
    states: list[Any]
    cells: list[list[Any]]
    layers: int
    directions: int


def _read(context: NodeContext) -> _Call:
    packed = int("data" in str(getattr(context.node.target, "_overloadname", "")))
    states, weights = context.arg(1 + packed), context.arg(2 + packed)
    layers, directions = int(context.arg(4 + packed)), 2 if context.arg(7 + packed) else 1
    step = len(weights) // (layers * directions)
    cells = [list(weights[i : i + step]) for i in range(0, len(weights), step)]
    return _Call(
        context.arg(0), list(states) if isinstance(states, (list, tuple)) else [states], cells, layers, directions
    )


@rule("<cells>")
def recurrent(context: NodeContext) -> Result:
    """A hidden unit is its rows in every gate and its columns; both directions of a layer have the same width, as
    torch's kernels want. All layers have where their states are seen from outside, which holds them in one tensor."""
    call = _read(context)
    x = context.state(call.x)
    for axis, axis_map in x.axes.items():
        if axis != len(x.shape) - 1:
            context.freeze(axis_map, "recurrent", "steps of a sequence")
    below = x.axis(-1)
    blocker = context.blocked_by(call.x, "read by a recurrent layer")
    layers: list[_Cell] = []
    for layer in range(call.layers):
        cells = [
            _cell(context, weights, below, blocker)
            for weights in call.cells[layer * call.directions : (layer + 1) * call.directions]
        ]
        for other in cells[1:]:
            context.tie(cells[0].hidden, other.hidden, other.width, _HELD)
            context.tie(cells[0].out, other.out, other.out_width, _HELD)
        layers.append(cells[0])
        below = concatenate([(c.out, c.out_width) for c in cells])
    last = layers[-1]
    own = _own_states(context.node, call.states)
    if call.layers > 1 and not (own and not _states_used(context.node)):
        for cell in layers[:-1]:
            context.tie(cell.hidden, last.hidden, last.width, _HELD)
            context.tie(cell.out, last.out, last.out_width, _HELD)
    widths = [(last.out, last.out_width), (last.hidden, last.width)]
    for state, (axis_map, length) in zip(call.states, widths, strict=False):
        _tie_state(context, state, axis_map, length)
    shapes = context.shapes
    ends = [State(s or (), {len(s or ()) - 1: m}) for s, (m, _) in zip(shapes[1:], widths, strict=False)]
    first = shapes[0] or ()
    return [State(first, {len(first) - 1: below}), *ends]


def _cell(context: NodeContext, weights: list[Any], below: AxisMap, blocker: str) -> _Cell:
    form = line_of(context).form
    assert isinstance(form, Cells)
    gates = form.gates
    states = [context.state(w) for w in weights]
    rows_in, rows_hidden = states[0], states[1]
    width = rows_in.shape[0] // gates
    context.tie(below, rows_in.axis(1), rows_in.shape[1], blocker)
    hidden: AxisMap = {}
    for state in states[:2] + [s for s in states[2:] if len(s.shape) == 1]:
        parts = context.reshape(State((gates * width,), {0: state.axis(0)}), (gates, width))
        if parts.axis(0):
            context.freeze(parts.axis(0), "selected", "one gate of a recurrent layer is used by itself")
        if not hidden:
            hidden = parts.axis(1)
        context.tie(hidden, parts.axis(1), width, _HELD)
    projection = next((i for i, s in enumerate(states) if i > 1 and len(s.shape) == 2), None)
    if projection is None:
        context.tie(hidden, rows_hidden.axis(1), width, _HELD)
        return _Cell(hidden, width, hidden, width)
    matrix = states[projection]  # (projected, hidden)
    context.tie(hidden, matrix.axis(1), width, _HELD)
    context.tie(matrix.axis(0), rows_hidden.axis(1), matrix.shape[0], _HELD)
    node = weights[projection]
    # torch sees by these two widths whether there is a projection
    context.effects.guards.append(
        Guard("lt", TensorSize(node, 0), TensorSize(node, 1), True, context.node.meta.get("source"))
    )
    return _Cell(hidden, width, matrix.axis(0), matrix.shape[0])


def _tie_state(context: NodeContext, node: Any, axis_map: AxisMap, length: int) -> None:
    state = context.state(node)
    last = len(state.shape) - 1
    for axis, held in state.axes.items():
        if axis != last:
            context.freeze(held, "recurrent", "layers and sequences of a recurrent state")
    context.tie(axis_map, state.axis(last), length, context.blocked_by(node, "starts from a state that cannot be cut"))


def _own_states(node: fx.Node, states: list[Any]) -> bool:
    """Did a module of torch make its initial states itself? Then ours can take its place, with widths that differ;
    in place of a subclass it would lose what that adds, and torch's kernel wants equal ones."""
    path = node.meta["module"]
    return bool(path) and node.meta["class"] in (nn.LSTM, nn.GRU, nn.RNN) and all(
        isinstance(s, fx.Node) and operator_name(s) == "zeros" and s.meta["module"] == path for s in states
    )


def _states_used(node: fx.Node) -> bool:
    """Does anything but the module itself look at the states it returns?"""
    return any(user.args[1] != 0 and _looked_at(user) for user in node.users)


def _looked_at(node: fx.Node) -> bool:
    return any(
        u.op == "output" or operator_name(u) not in ("index_select", "squeeze") or _looked_at(u) for u in node.users
    )


@rule("_pack_padded_sequence")
def pack(context: NodeContext) -> Result:
    """(sequences, steps, ...) or (steps, sequences, ...) to (all steps, ...)."""
    x = context.state(context.arg(0))
    _hold_steps(context, x, 2)
    out, sizes = context.shapes
    return [x.moved(out or (), {a: a - 1 for a in range(2, len(x.shape))}), State(sizes or ())]


@rule("_pad_packed_sequence")
def pad(context: NodeContext) -> Result:
    """The inverse; what is filled up is alike on all channels."""
    x = context.state(context.arg(0))
    _hold_steps(context, x, 1)
    out, lengths = context.shapes
    return [x.moved(out or (), {a: a + 1 for a in range(1, len(x.shape))}), State(lengths or ())]


def _hold_steps(context: NodeContext, x: State, axes: int) -> None:
    for axis in range(axes):
        context.freeze(x.axis(axis), "recurrent", "steps of a sequence")
