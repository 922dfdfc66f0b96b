"""The rules, by kind. Importing this package registers all of them."""

from . import collectives, contraction, elementwise, indexing, movement, recurrent, scattering, statistics, vision
from .registry import RULES, rule, rule_for

__all__ = [
    "RULES",
    "collectives",
    "contraction",
    "elementwise",
    "indexing",
    "movement",
    "recurrent",
    "rule",
    "rule_for",
    "scattering",
    "statistics",
    "vision",
]
