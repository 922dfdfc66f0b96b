"""Sensitivity: what each group loses as it is pruned alone, measured, kept in a file and used to choose widths."""

from .curve import Curve, Sensitivity
from .measure import sensitivity

__all__ = ["Curve", "Sensitivity", "sensitivity"]
