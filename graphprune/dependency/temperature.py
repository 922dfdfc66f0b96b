"""Numbers computed from sizes that scale a tensor - the attention temperature 1/sqrt(d) - must keep their value.

When features are cut, `q * d ** -0.5` would scale differently than before. The change is folded into the layer that
makes q: its rows are multiplied by old / new. This module finds that layer and those rows, or says that there is none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import fx

from ..tracing.names import operator_name
from ..tracing.origin import evaluate, recorded_value
from .analysis import Analysis
from .effects import ScalarSite
from .sizes import Conflict, SizeSolver
from .state import Vector

_SAME = frozenset("alias clone contiguous detach _to_copy".split())
_MOVEMENT = _SAME | frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze select slice split "
    "split_with_sizes unsafe_split unbind expand".split()
)
_PRODUCTS = frozenset(("matmul", "bmm", "mm"))
_SCALING = frozenset(("mul", "div", "mul_", "div_"))


@dataclasses.dataclass(frozen=True)
class Rescale:
    """Multiply the given indices of an axis of a parameter by a factor."""

    parameter: str
    axis: int
    indices: tuple[int, ...]
    factor: float


def rescales(analysis: Analysis, solver: SizeSolver) -> tuple[list[Rescale], list[Conflict]]:
    """The corrections for one choice of removed positions, and the numbers that cannot be corrected."""
    found: list[Rescale] = []
    conflicts: list[Conflict] = []
    for site in analysis.scalars:
        before = evaluate(site.expr, recorded_value)
        after = solver.evaluate(site.expr)
        if after == before:
            continue
        fix = None
        if after:
            ratio = before / after
            fix = _correction(analysis, site, 1 / ratio if site.divide else ratio)
        if fix is None:
            text = "a factor computed from sizes would change, and no layer before it can make up for it"
            conflicts += solver.blame(site.expr, text, site.node)
        else:
            found += fix
    return found, conflicts


def _correction(analysis: Analysis, site: ScalarSite, factor: float) -> list[Rescale] | None:
    for start in _sources(site):
        node, sink = start
        while operator_name(node) in _MOVEMENT or operator_name(node) == "getitem":
            node = node.args[0]  # type: ignore[assignment]
        name = operator_name(node)
        if name == "linear":
            weight, bias, out_axis = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias"), -1
            weight_axis = 0
        elif name == "addmm":
            bias, weight, out_axis = node.args[0], node.args[2], -1
            weight_axis = 1
        elif name == "mm":
            weight, bias, out_axis, weight_axis = node.args[1], None, -1, 1
        elif name == "convolution" and not node.args[6]:
            weight, bias, out_axis, weight_axis = node.args[1], node.args[2], 1, 0
        else:
            continue
        rows = _rows_reaching(node, out_axis, start[0], sink)
        if rows is None or not isinstance(weight, fx.Node):
            continue
        if operator_name(weight) == "t" and isinstance(weight.args[0], fx.Node):
            weight, weight_axis = weight.args[0], 1 - weight_axis
        out = []
        usable = True
        for tensor, axis in ((weight, weight_axis), (bias, 0)):
            if tensor is None:
                continue
            if not isinstance(tensor, fx.Node) or "parameter" not in tensor.meta or len(tensor.users) != 1:
                usable = False
                break
            out.append(Rescale(tensor.meta["parameter"], axis, tuple(rows.tolist()), factor))
        if usable:
            return out
    return None


def _sources(site: ScalarSite) -> list[tuple[fx.Node, fx.Node]]:
    """Tensors whose scaling has the same effect: (tensor, the node that consumes it)."""
    node, sink = site.operand, site.node
    while operator_name(node) in _MOVEMENT or (operator_name(node) in _SCALING and len(node.all_input_nodes) == 1):
        if operator_name(node) in _SCALING:
            sink = node
        node = node.args[0]  # type: ignore[assignment]
        if operator_name(node) in _PRODUCTS or node.op != "call_function":
            break
    if operator_name(node) in _PRODUCTS:
        return [(node.args[0], node), (node.args[1], node)]  # type: ignore[list-item]
    return [(site.operand, site.node)] if sink is site.node else [(site.operand, site.node), (node, sink)]


def _rows_reaching(producer: fx.Node, out_axis: int, operand: fx.Node, sink: fx.Node) -> Vector | None:
    """Which output channels of `producer` reach `sink` as `operand`, through data movement, and nothing else.

    The very calls of the recording are run on an array that holds the channel number of every element.
    """
    meta = producer.meta["val"]
    axis = out_axis % len(meta.shape)
    view = [1] * len(meta.shape)
    view[axis] = meta.shape[axis]
    start = torch.arange(meta.shape[axis]).reshape(view).expand(meta.shape).contiguous()
    arrays: dict[fx.Node, Any] = {producer: start}
    mine: list[Vector] = []
    others: list[Vector] = []
    queue = [producer]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user is not sink and operator_name(user) in _SAME:
                arrays[user] = arrays[node]
            elif user is not sink and (operator_name(user) in _MOVEMENT or operator_name(user) == "getitem"):
                arrays[user] = _move(user, arrays[node])
            else:
                times = max(1, sum(1 for a in user.args if a is node))
                (mine if user is sink and node is operand else others).extend([np.unique(arrays[node].numpy())] * times)
                continue
            queue.append(user)
    if len(mine) != 1 or any(len(np.intersect1d(mine[0], rows)) for rows in others):
        return None
    return mine[0]


def _move(node: fx.Node, array: Any) -> Any:
    if operator_name(node) == "getitem":
        return array[node.args[1]]
    if operator_name(node) in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return array.reshape(node.args[1])
    return node.target(array, *node.args[1:], **node.kwargs)  # type: ignore[operator]
