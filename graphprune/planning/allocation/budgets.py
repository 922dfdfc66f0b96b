"""What a budget can limit, by name: one registered function each, from a network to what its widths cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from ...dependency import DependencyGraph
from ...errors import GraphPruneError
from ...plans.surgery import Fold
from ...support.registry import Registry
from .costs import CostModel, mac_costs, parameter_costs
from .memory import MemoryCosts

CostFunction = Callable[[DependencyGraph, nn.Module, Sequence[Fold]], CostModel]
_F = TypeVar("_F", bound=CostFunction)


@dataclasses.dataclass(frozen=True)
class BudgetKind:
    """One name that `Budget` takes.

    `cost`: the function (graph, model, folds) -> CostModel, `folds` being the batch norms that the pruned network will
    not have; None of times, which are forecast. `form`: how a number of it is printed, as `format` has it.
    """

    name: str
    cost: CostFunction | None
    form: str = ",.0f"

    @property
    def timed(self) -> bool:
        """Whether it limits how long a call takes."""
        return self.cost is None

    def of(self, graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> CostModel:
        """The cost of the pruned network. Raises GraphPruneError, naming the budget, where the function fails or
        returns something else."""
        assert self.cost is not None
        try:
            made = self.cost(graph, model, folds)
            fits = isinstance(made, CostModel)
        except GraphPruneError:
            raise
        except Exception as error:
            raise GraphPruneError(
                f"budget: the function of {self.name!r} failed: {type(error).__name__}: {error}"
            ) from error
        if not fits:
            raise GraphPruneError(
                f"budget: the function of {self.name!r} returned {type(made).__name__}: expected a cost model, such as "
                f"graphprune.dependency.axes.ProductCosts"
            )
        return made


BUDGETS: Registry[BudgetKind] = Registry("budget")


def budget_kind(name: str, *, form: str = ",.0f") -> Callable[[_F], _F]:
    """Register a function `(graph, model, folds) -> CostModel` under `name`, for `Budget(name=...)` and the command
    line's `--budget name=...`. `form`: see `BudgetKind`.

    The function itself is returned unchanged. Defining the same function again replaces it. Raises GraphPruneError
    where the name is no Python identifier, or another function has it.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise GraphPruneError(f"budget: expected a name that can be an argument, such as 'activations', got {name!r}")

    def register(function: _F) -> _F:
        BUDGETS.add(name, BudgetKind(name, function, form), function)
        return function

    return register


@budget_kind("macs")
def _macs(graph: DependencyGraph, model: nn.Module, folds: Sequence[Fold]) -> CostModel:
    return mac_costs(graph)


budget_kind("params")(parameter_costs)
budget_kind("memory")(MemoryCosts)
for _name in ("latency", "latency_ms"):
    BUDGETS.add(_name, BudgetKind(_name, None, ",.4g"))
