"""Recovery without training: mean compensation, batch norm re-estimation, least squares against the dense network."""

from .layers import LayerRecovery
from .recover import METHODS, Recovery, check_method, recover

__all__ = ["METHODS", "LayerRecovery", "Recovery", "check_method", "recover"]
