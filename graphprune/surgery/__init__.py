"""Cut tensors, set attributes, fold batch norms: always on a copy."""

from .copying import clone_with
from .cutting import operate
from .folding import Fold, apply_folds, effective_folds, find_folds, fold_conv_bn, fold_names, folded_tensors
from .layers import remove_layers

__all__ = [
    "Fold",
    "apply_folds",
    "clone_with",
    "effective_folds",
    "find_folds",
    "fold_conv_bn",
    "fold_names",
    "folded_tensors",
    "operate",
    "remove_layers",
]
