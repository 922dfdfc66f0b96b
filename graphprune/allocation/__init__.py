"""How many units of each group stay, and which."""

from .allocate import Allocation, Settings, allocate
from .selection import ignored_positions, matching_ratios

__all__ = ["Allocation", "Settings", "allocate", "ignored_positions", "matching_ratios"]
