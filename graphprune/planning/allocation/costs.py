"""What budgets limit, as a function of the widths of groups: multiply-accumulates and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Protocol

from torch import fx, nn

from ...dependency import DependencyGraph
from ...dependency.axes import Floats, ProductCosts, axes_of
from ...dependency.state import AxisMap, Mask
from ...plans.surgery import Fold, fold_names
from ...support.walking import named_tensors
from ...tracing.names import operator_name
from ...tracing.work import macs_of


class CostModel(Protocol):
    """A cost that a budget limits: of fractions kept (an estimate with its slopes), and of one exact choice."""

    @property
    def full(self) -> float:
        """The cost with everything kept."""

    def value(self, kept: Floats) -> float:
        """The cost with a fraction `kept[g]` of the units of group g."""

    def slopes(self, kept: Floats) -> Floats:
        """Its derivatives by those fractions."""

    def exact(self, gone: Mask) -> float:
        """The cost when these components are removed."""

    def curve(self, group: int, kept: Floats, fractions: Floats) -> Floats:
        """The part of the cost that depends on this group, at each of these fractions; the others as in `kept`."""

    def partners(self, group: int) -> Set[int]:
        """The groups whose widths change `curve` of this one."""


_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "linear": 0, "addmm": 1, "baddbmm": 1}
_ATTENTION = "scaled_dot_product_attention"


def mac_costs(graph: DependencyGraph) -> ProductCosts:
    """Multiply-accumulates of the recorded run, as `graphprune.count` counts them. Calls of kinds other than
    convolutions, matrix products and attention are held at what they cost now."""
    costs = ProductCosts(graph)
    for node in graph.trace.graph.nodes:
        macs = macs_of(node)
        if macs:
            _add_call(costs, graph, node, macs)
    return costs


def _add_call(costs: ProductCosts, graph: DependencyGraph, node: fx.Node, macs: int) -> None:
    operation = operator_name(node)
    axes: list[tuple[AxisMap, int]]
    if operation == "convolution" and isinstance(node.args[1], fx.Node):
        axes = axes_of(graph, node.args[1])
    elif operation in _PRODUCTS and isinstance(node.args[_PRODUCTS[operation]], fx.Node):
        left = node.args[_PRODUCTS[operation]]
        assert isinstance(left, fx.Node)
        axes = [*axes_of(graph, node), axes_of(graph, left)[-1]]
    elif operation.startswith((_ATTENTION, "_" + _ATTENTION)):
        _add_attention(costs, graph, node, macs)
        return
    else:
        axes = []
    costs.add(macs / math.prod(n for _, n in axes), axes)


def _add_attention(costs: ProductCosts, graph: DependencyGraph, node: fx.Node, macs: int) -> None:
    """Scores: query axes x keys x features; results: the same with the value's features."""
    query, key, value = (axes_of(graph, n) for n in node.args[:3])  # type: ignore[arg-type]
    shared = [*query[:-1], key[-2]]
    width = query[-1][1] + value[-1][1]
    unit = macs / (math.prod(n for _, n in shared) * width)
    costs.add(unit, [*shared, query[-1]])
    costs.add(unit, [*shared, value[-1]])


def parameter_costs(graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> ProductCosts:
    """Elements of all parameters of the pruned model; `folds`: the batch norms it will not have any more."""
    costs = ProductCosts(graph)
    named = named_tensors(model)
    parameters = {id(p) for p in model.parameters()}
    lost = {f"{f.batch_norm}.{p}" for f in folds for p in ("weight", "bias")}
    seen: set[int] = set()
    for name, tensor in named.items():
        if id(tensor) in parameters and id(tensor) not in seen and name not in lost:
            seen.add(id(tensor))
            roots = graph.analysis.dims.roots
            costs.add(1, [(roots.get((name, a), {}), n) for a, n in enumerate(tensor.shape)])
    for fold in folds:
        mean = f"{fold.batch_norm}.running_mean"
        if fold_names(fold)[1] not in named:
            costs.add(1, [(graph.analysis.dims.roots.get((mean, 0), {}), named[mean].shape[0])])
    return costs
