"""How many units of each group stay, and which."""

from .allocate import allocate
from .budget import Budget, Limit, UnreachableBudget
from .budgets import BUDGETS, BudgetKind, budget_kind
from .cells import Allocation
from .costs import CostModel, mac_costs, parameter_costs
from .kinds import Kinds, chosen_groups
from .limits import Forecasts, make_limits
from .rounding import Rounding, RoundTo
from .selection import matching_ratios
from .settings import Settings

__all__ = [
    "BUDGETS",
    "Allocation",
    "Budget",
    "BudgetKind",
    "CostModel",
    "Forecasts",
    "Kinds",
    "Limit",
    "RoundTo",
    "Rounding",
    "Settings",
    "UnreachableBudget",
    "allocate",
    "budget_kind",
    "chosen_groups",
    "mac_costs",
    "make_limits",
    "matching_ratios",
    "parameter_costs",
]
