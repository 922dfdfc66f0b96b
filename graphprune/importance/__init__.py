"""What a channel is worth. A criterion maps a group to one score per unit; a decorator registers more."""

from __future__ import annotations

from . import (  # noqa: F401  (importing them registers their criteria)
    activation,
    batchnorm,
    chance,
    flow,
    geometric,
    gradient,
    magnitude,
    reconstruction,
)
from .context import BatchNormLink, ImportanceContext
from .registry import Criterion, criterion, known_criteria, normalise
from .resolving import resolve_criterion, with_options

__all__ = [
    "BatchNormLink",
    "Criterion",
    "ImportanceContext",
    "criterion",
    "known_criteria",
    "normalise",
    "resolve_criterion",
    "with_options",
]
