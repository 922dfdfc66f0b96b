"""Inputs made from nothing but the network: by what its batch norms store, or said by a language model itself."""

from .calls import Synthetic, made_for, synthesize
from .made import SyntheticInputs

__all__ = ["Synthetic", "SyntheticInputs", "made_for", "synthesize"]
