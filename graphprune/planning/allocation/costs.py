"""What budgets limit, as a function of the widths of groups: multiply-accumulates and parameters."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol, runtime_checkable

from torch import nn

from ...dependency import DependencyGraph
from ...dependency.axes import Floats, ProductCosts, loop_axes
from ...dependency.state import Mask
from ...plans.surgery import Fold, fold_names
from ...support.walking import named_tensors


@runtime_checkable
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


def mac_costs(graph: DependencyGraph) -> ProductCosts:
    """Multiply-accumulates of the run in eval mode, as `graphprune.count` counts them."""
    costs = ProductCosts(graph)
    analysis = graph.analysis
    for terms in graph.trace.work.values():
        for term in terms:
            costs.add(1, loop_axes(analysis, term))
    return costs


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
