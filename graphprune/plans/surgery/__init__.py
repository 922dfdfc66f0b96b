"""Cut tensors, set attributes, fold batch norms: always on a copy."""

from .attributes import attribute_at
from .copying import clone_with
from .cutting import operate
from .folding import Fold, apply_folds, check_folds, effective_folds, find_folds, fold_names, folded_tensors
from .layers import bypass_layers, close_gaps, remove_layers, remove_listed_experts, uncounted_tokens
from .wearing import worn

__all__ = [
    "Fold",
    "apply_folds",
    "attribute_at",
    "bypass_layers",
    "check_folds",
    "clone_with",
    "close_gaps",
    "effective_folds",
    "find_folds",
    "fold_names",
    "folded_tensors",
    "operate",
    "remove_layers",
    "remove_listed_experts",
    "uncounted_tokens",
    "worn",
]
