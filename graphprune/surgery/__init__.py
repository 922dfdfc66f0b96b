"""Cut tensors, set attributes, fold batch norms: always on a copy."""

from .copying import clone_with
from .cutting import operate
from .folding import Fold, effective_folds, find_folds, fold_conv_bn, fold_names, folded_tensors

__all__ = [
    "Fold",
    "clone_with",
    "effective_folds",
    "find_folds",
    "fold_conv_bn",
    "fold_names",
    "folded_tensors",
    "operate",
]
