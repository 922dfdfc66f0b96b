"""Recurrent layers, analysed as whole calls (lstm, gru, rnn_tanh, rnn_relu)."""

from __future__ import annotations

from typing import Any

from ..context import NodeContext, Result
from .registry import empty, rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(context: NodeContext) -> Result:
    """The input width of the first layer may shrink; hidden widths are tied across gates, layers and states by the
    closed module and stay."""
    x = context.state(context.arg(0))
    packed = "data" in str(getattr(context.node.target, "_overloadname", ""))
    weights = context.arg(3 if packed else 2)
    biases = bool(context.arg(4 if packed else 3))
    layers = int(context.arg(5 if packed else 4))
    bidirectional = bool(context.arg(8 if packed else 7))
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (layers * directions)
    del biases
    for axis, axis_map in x.axes.items():
        if axis != len(x.shape) - 1:
            context.freeze(axis_map, "recurrent", "steps of a sequence")
    for position, weight in enumerate(weights):
        state = context.state(weight)
        first_layer = position < per_cell * directions and position % per_cell == 0
        context.freeze(state.axis(0), "recurrent", "hidden width of a recurrent layer")
        cell = context.state(weights[position - position % per_cell])
        if state.shape[0] == cell.shape[0]:  # the gates of one cell
            context.tie(cell.axis(0), state.axis(0), state.shape[0], "a gate of a recurrent layer")
        if len(state.shape) > 1:
            if first_layer:
                context.tie(x.axis(-1), state.axis(1), state.shape[1], "read by a recurrent layer")
            else:
                context.freeze(state.axis(1), "recurrent", "hidden width of a recurrent layer")
    for other in _hidden(context.arg(2 if packed else 1)):
        context.freeze_state(context.state(other), "recurrent", "state of a recurrent layer")
    return empty(context)


def _hidden(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
