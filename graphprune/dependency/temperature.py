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
from ..tracing.operators import Kind, Matrices, Move, Product, form_of, kind_of, operator_of, products_of, shape_of
from ..tracing.origin import evaluate, recorded_value
from .analysis import Analysis
from .effects import ScalarSite
from .sizes import Conflict, SizeSolver
from .state import Vector


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
    for operand, sink in _sources(site):
        node = operand
        while _moves(node):
            node = node.all_input_nodes[0]
        for product in products_of(node):
            found = _scaling(product, node, operand, sink, factor)
            if found is not None:
                return found
    return None


def _scaling(
    product: Product, producer: fx.Node, operand: fx.Node, sink: fx.Node, factor: float
) -> list[Rescale] | None:
    """The factor on the rows of the weight of a product, and on its bias; None where they are no parameters of its own,
    or more than those rows would change."""
    if len(product.produces) != 1 or product.result_axis is None or product.left or not product.fixed:
        return None
    weight, axis = product.weight, product.produces[0]
    if (product.transposed and product.groups > 1) or kind_of(producer) is Kind.LOOKUP:
        return None
    rows = _rows_reaching(producer, product.result_axis, operand, sink)
    if rows is None:
        return None
    if operator_name(weight) == "t":
        weight, axis = weight.all_input_nodes[0], 1 - axis
    out = []
    for tensor, along in ((weight, axis), (product.bias, 0)):
        if tensor is None:
            continue
        if not isinstance(tensor, fx.Node) or "parameter" not in tensor.meta or len(tensor.users) != 1:
            return None
        if tensor is product.bias and len(shape_of(tensor)) != 1:
            return None
        out.append(Rescale(tensor.meta["parameter"], along, tuple(rows.tolist()), factor))
    return out


def _moves(node: fx.Node) -> bool:
    """Data movement, of one tensor: every element of the result is one of its elements."""
    if operator_name(node) == "getitem":
        return True
    operator = operator_of(node)
    return operator is not None and operator.passes and len(node.all_input_nodes) == 1


def _stays(node: fx.Node) -> bool:
    operator = operator_of(node)
    return operator is not None and operator.move is Move.STAYS


def _multiplies(node: fx.Node) -> bool:
    """A product of two tensors and nothing else."""
    form = form_of(node)
    return isinstance(form, Matrices) and form.bias is None


def _scales(node: fx.Node) -> bool:
    """A tensor times a number."""
    operator = operator_of(node)
    factors = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    return operator is not None and operator.scales and len(factors) == 1 and factors[0] is node.args[0]


def _sources(site: ScalarSite) -> list[tuple[fx.Node, fx.Node]]:
    """Tensors whose scaling has the same effect: (tensor, the node that consumes it)."""
    node, sink = site.operand, site.node
    while operator_name(node) != "getitem" and (_moves(node) or _scales(node)):
        if _scales(node):
            sink = node
        node = node.all_input_nodes[0]
        if _multiplies(node) or node.op != "call_function":
            break
    if _multiplies(node):
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
            if user is not sink and _stays(user):
                arrays[user] = arrays[node]
            elif user is not sink and _moves(user):
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
    operator = operator_of(node)
    if operator is not None and operator.move is Move.RESHAPES:
        return array.reshape(shape_of(node))
    return node.target(array, *node.args[1:], **node.kwargs)  # type: ignore[operator]
