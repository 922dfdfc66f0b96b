"""Weights that a module computes from other tensors (weight norm, spectral norm, any parametrisation): seen as the
weights that they are, and how what they are computed from follows."""

from .forms import Form
from .live import Live, live_weight
from .plain import Reparametrised, forget, forms_in, held_positions, plain, reparametrised

__all__ = [
    "Form",
    "Live",
    "Reparametrised",
    "forget",
    "forms_in",
    "held_positions",
    "live_weight",
    "plain",
    "reparametrised",
]
