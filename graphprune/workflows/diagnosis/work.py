"""Where the multiply-accumulates of a recorded call lie: over which axes its loops run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from torch import fx

from ...dependency.analysis import Analysis
from ...dependency.state import AxisMap, State
from ...tracing.names import operator_name
from ...tracing.work import macs_of

Axes = list[tuple[int, AxisMap]]  # length and coordinates


@dataclasses.dataclass(frozen=True)
class Work:
    """`macs` multiply-accumulates, spread evenly over all combinations of indices of `axes` (and of axes that no
    channel lies on, which are left out)."""

    macs: int
    axes: Axes


def work_of(node: fx.Node, analysis: Analysis) -> Iterator[Work]:
    """The work of one recorded call; its parts add up to what `graphprune.count` counts for it."""
    macs = macs_of(node) if node.op == "call_function" else None
    if not macs:
        return
    name = operator_name(node)
    if "scaled_dot_product" in name:
        yield from _attention(node, analysis, macs)
    elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        yield from _recurrent(node, analysis, macs)
    elif name in ("convolution", "_convolution"):
        x, weight = (analysis.state(a) for a in node.args[:2])  # type: ignore[arg-type]
        sites = x if node.args[6] else analysis.state(node)
        yield Work(macs, [*_axes(weight, 0, 1), *_axes(sites, *(a for a in range(len(sites.shape)) if a != 1))])
    elif name in _CONTRACTED:
        out = analysis.state(node)
        yield Work(macs, [*_axes(out, *range(len(out.shape))), *_summed(node, analysis, name)])
    else:  # at least what it produces is known
        out = analysis.state(node)
        yield Work(macs, _axes(out, *range(len(out.shape))))


_CONTRACTED = frozenset(("mm", "bmm", "matmul", "linear", "mv", "dot", "addmm", "baddbmm"))


def _summed(node: fx.Node, analysis: Analysis, name: str) -> Axes:
    """The axis that is summed over, as that operand has it that has channels there."""
    operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    first = 1 if name in ("addmm", "baddbmm") else 0
    left, right = (analysis.state(a) for a in operands[first : first + 2])
    return _axes(left, -1) or _axes(right, -1 if name == "linear" or len(right.shape) == 1 else -2)


def _axes(state: State, *axes: int) -> Axes:
    """Those axes that carry channels."""
    rank = len(state.shape)
    return [(state.shape[a], state.axis(a)) for a in axes if -rank <= a < rank and state.axis(a)]


def _attention(node: fx.Node, analysis: Analysis, macs: int) -> Iterator[Work]:
    query, key, value = (analysis.state(n) for n in node.all_input_nodes[:3])
    lead = range(len(query.shape) - 1)
    features = query.shape[-1] + value.shape[-1]
    scores = macs * query.shape[-1] // features
    both = [*_axes(query, *lead), *_axes(key, -2)]
    yield Work(scores, [*both, *_axes(query, -1)])
    yield Work(macs - scores, [*both, *_axes(value, -1)])


def _recurrent(node: fx.Node, analysis: Analysis, macs: int) -> Iterator[Work]:
    """Every matrix of weights works once per step."""
    weights = [analysis.state(n) for n in node.all_input_nodes if "parameter" in n.meta]
    matrices = [w for w in weights if len(w.shape) == 2]
    total = sum(math.prod(w.shape) for w in matrices)
    for weight in matrices:
        yield Work(macs * math.prod(weight.shape) // total, _axes(weight, 0, 1))
