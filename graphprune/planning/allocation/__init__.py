"""How many units of each group stay, and which."""

from .allocate import allocate
from .budget import Budget, Limit, UnreachableBudget
from .budgets import BUDGETS, BudgetKind, budget_kind
from .cells import Allocation
from .costs import CostModel, mac_costs, parameter_costs
from .limits import Forecasts, make_limits
from .selection import ignored_positions, kinds_of, matching_ratios
from .settings import Settings

__all__ = [
    "BUDGETS",
    "Allocation",
    "Budget",
    "BudgetKind",
    "CostModel",
    "Forecasts",
    "Limit",
    "Settings",
    "UnreachableBudget",
    "allocate",
    "budget_kind",
    "ignored_positions",
    "kinds_of",
    "mac_costs",
    "make_limits",
    "matching_ratios",
    "parameter_costs",
]
