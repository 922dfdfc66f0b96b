"""Whole blocks fitted by gradient to what the dense network makes, without labels."""

from .fit import Fitted, fit_blocks
from .places import Place, find_places
from .samples import chosen, separable
from .settings import BlockFit
from .weights import own_parameters

__all__ = ["BlockFit", "Fitted", "Place", "chosen", "find_places", "fit_blocks", "own_parameters", "separable"]
