"""Small networks of the kinds that pruning engines get wrong, and a generator of random ones."""

from __future__ import annotations

from . import (
    attention,
    blocks,
    caches,
    convolutions,
    flattening,
    gating,
    inplace,
    joining,
    modules,
    movement,
    norms,
    parameters,
    routing,
    sharing,
    slicing,
    structure,
)
from .random import random_network
from .random_programs import random_program
from .registry import NETWORKS, Network

THEMES = (
    movement, flattening, slicing, joining, gating, convolutions, norms, parameters, sharing, inplace, attention,
    modules, structure, blocks, caches, routing,
)  # fmt: skip
"""The modules that fill the registry."""

__all__ = ["NETWORKS", "THEMES", "Network", "random_network", "random_program"]
