"""The layers of a recorded run that read channels: y = W x + b, as linear layers and convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import fx

from ...tracing.names import operator_name
from ...tracing.operators import (
    Declared,
    Layer,
    Matrices,
    Merge,
    Product,
    Sliding,
    given,
    positions,
    rank,
)
from ...tracing.trace import Trace


class Places(NamedTuple):
    """Places of arguments in an operator's schema; `bias` is None where none is given."""

    data: int
    weight: int
    bias: int | None


@dataclasses.dataclass(frozen=True)
class Reader:
    """One weight that is used by linear layers or convolutions alone.

    `weight`, `bias`: parameter names; `bias` is empty where there is none. `in_axis`, `out_axis`: axes of the weight
    (for a convolution of several groups axis 1 counts inside one group). `data_axis`, `result_axis`: those of what it
    reads and makes, from the end. `declared`: the name of the user's operator that it calls, "" for one of torch's;
    `places`: where that takes its tensors. `order`: place of its first call in the run; `calls`: how often it is
    called. `adds`: its one result is used once, in a plain addition of two tensors of the same shape, and the other
    operand is there before. `after`: the readers (by weight) whose results its input is computed from, and those of
    that other operand.
    """

    weight: str
    bias: str
    convolution: bool
    transposed: bool
    groups: int
    in_axis: int
    out_axis: int
    data_axis: int
    result_axis: int
    declared: str
    places: Places
    order: int
    calls: int
    adds: bool
    after: frozenset[str]

    @property
    def separable(self) -> bool:
        """Its results are those of one matrix product per group. Of transposed convolutions only those of one group
        are seen that way."""
        return not self.transposed or self.groups == 1


def find_readers(trace: Trace) -> list[Reader]:
    """Every reader, in the order of the first calls."""
    index = {node: i for i, node in enumerate(trace.graph.nodes)}
    calls: dict[str, list[fx.Node]] = {}
    made: dict[str, list[Product]] = {}
    for name, node in trace.parameters.items():
        if trace.products.keys().isdisjoint(node.users):
            continue
        users = sorted(node.users, key=index.__getitem__)
        products = [product for user in users if (product := _product(trace, user, node)) is not None]
        if len(products) == len(users) and _alike(users, products) and _bias(users, products) is not None:
            calls[name], made[name] = users, products
    ancestors = _ancestors(trace, {n: name for name, nodes in calls.items() for n in nodes})
    out = []
    for name, nodes in calls.items():
        first, product = nodes[0], made[name][0]
        form = trace.lines[first].form
        before = frozenset().union(*(ancestors[a] for n in nodes for a in n.all_input_nodes)) - {name}
        other = _added(trace, first) if len(nodes) == 1 else None
        adds = other is not None and all(
            index[n] < index[first] for weight in ancestors[other] for n in calls[weight]
        ) and name not in ancestors[other]
        if adds and other is not None:
            before |= ancestors[other]
        assert product.data_axis is not None and product.result_axis is not None
        out.append(
            Reader(
                weight=name,
                bias=_bias(nodes, made[name]) or "",
                convolution=isinstance(form, Sliding),
                transposed=product.transposed,
                groups=product.groups,
                in_axis=product.reads[0],
                out_axis=product.produces[0],
                data_axis=product.data_axis - rank(product.data),
                result_axis=product.result_axis - rank(first),
                declared=operator_name(first) if isinstance(form, Declared) else "",
                places=_places(first, product),
                order=index[first],
                calls=len(nodes),
                adds=adds,
                after=before,
            )
        )
    return sorted(out, key=lambda r: r.order)


def _product(trace: Trace, user: fx.Node, weight: fx.Node) -> Product | None:
    """What a call multiplies with `weight`, as a layer does: one matrix or kernel, read by nothing else of it."""
    made = trace.products.get(user, ())
    found = [product for product in made if product.weight is weight]
    if len(found) != 1 or sum(argument is weight for argument in _operands(user)) != 1:
        return None
    (product,) = found
    if product.left or product.scaled or len(product.produces) != 1 or len(product.reads) != 1:
        return None
    if product.data_axis is None or product.result_axis is None:
        return None
    form = trace.lines[user].form
    matrix = isinstance(form, Matrices) and rank(weight) == 2 and len(_operands(user)) == 2 + (form.bias is not None)
    own = isinstance(form, Declared) and len(made) == 1
    return product if matrix or own or isinstance(form, (Layer, Sliding)) else None


def _places(node: fx.Node, product: Product) -> Places:
    found = {given(node, place): place for place in positions(node.target).values()}
    bias = found.get(product.bias) if isinstance(product.bias, fx.Node) else None
    return Places(found.get(product.data, -1), found.get(product.weight, -1), bias)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors among a call's arguments, each as often as it stands there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _alike(nodes: list[fx.Node], products: list[Product]) -> bool:
    """The calls do the same with their weight."""
    forms = {
        (operator_name(n), p.produces, p.reads, p.groups, p.data_axis - rank(p.data), p.result_axis - rank(n))  # type: ignore[operator]
        for n, p in zip(nodes, products, strict=True)
    }
    return len(forms) == 1


def _bias(nodes: list[fx.Node], products: list[Product]) -> str | None:
    """The name of the bias, "" without one. None where there is one that is not these calls' own parameter."""
    found: set[Any] = {product.bias for product in products}
    bias = found.pop()
    if found or not (bias is None or isinstance(bias, fx.Node)):
        return None
    if bias is None:
        return ""
    alone = all(user in nodes for user in bias.users)
    return bias.meta.get("parameter") if alone else None


def _added(trace: Trace, node: fx.Node) -> fx.Node | None:
    """The other operand, where the result of `node` goes into a plain addition and nowhere else."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    operator = trace.lines.get(user)
    if operator is None or operator.merge is not Merge.SUM or user.kwargs or len(user.args) != 2:
        return None
    left, right = user.args
    other = right if left is node else left
    if not isinstance(other, fx.Node) or other is node or other.op != "call_function":
        return None
    meta = other.meta.get("val")
    return other if getattr(meta, "shape", None) == node.meta["val"].shape else None


def _ancestors(trace: Trace, readers: dict[fx.Node, str]) -> dict[fx.Node, frozenset[str]]:
    """The readers that each recorded tensor depends on, itself included."""
    out: dict[fx.Node, frozenset[str]] = {}
    for node in trace.graph.nodes:
        inputs = [out[a] for a in node.all_input_nodes]
        own = frozenset((readers[node],)) if node in readers else frozenset()
        out[node] = own.union(*inputs) if len(inputs) != 1 or own else inputs[0]
    return out
