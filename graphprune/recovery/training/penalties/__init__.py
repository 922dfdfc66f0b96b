"""Training with pruning in mind: penalties that drive whole channels to zero."""

from .kinds import GroupLasso, GrowingPenalty
from .option import Regularize, check_regularize, penalty_of
from .penalty import GroupPenalty

__all__ = ["GroupLasso", "GroupPenalty", "GrowingPenalty", "Regularize", "check_regularize", "penalty_of"]
