"""Unstructured and patterned sparsity: masks that hold during training, schedules, small files, reports."""

from .encoding import DamagedError
from .files import load, save
from .gradients import gradient
from .magnitudes import magnitude
from .masks import make_permanent, masks, set_masks
from .overview import LayerSparsity, SparsityReport, report
from .patterns import blocks, n_m
from .schedules import Schedule, schedule
from .semi_structured import semi_structured, semi_structured_support

__all__ = [
    "DamagedError",
    "LayerSparsity",
    "Schedule",
    "SparsityReport",
    "blocks",
    "gradient",
    "load",
    "magnitude",
    "make_permanent",
    "masks",
    "n_m",
    "report",
    "save",
    "schedule",
    "semi_structured",
    "semi_structured_support",
    "set_masks",
]
