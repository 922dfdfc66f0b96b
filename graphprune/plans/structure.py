"""The structure of a model: names and shapes of its tensors, by which a plan knows the model it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import nn

from ..support.walking import named_tensors


def structure_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def shape_in(structure: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    """The shape of a weight, also of one that is computed from tensors that the structure names; None where it is not
    described."""
    path, _, last = name.rpartition(".")
    new = f"{path}.parametrizations.{last}.original".lstrip(".")
    # beside a weight_orig lies a weight_v that is something else
    places = (name, f"{name}_orig", f"{name}_v", new, f"{new}1", f"{new}0")
    return next((structure[place] for place in places if place in structure), None)


def structural_hash(model: nn.Module) -> str:
    """A hash of the names and shapes of a model, equal to that of the plans made for it."""
    return hash_of(structure_of(model))


def hash_of(structure: Mapping[str, tuple[int, ...]]) -> str:
    """The SHA-256 of names and shapes as JSON, sorted by name."""
    text = json.dumps({k: list(v) for k, v in sorted(structure.items())})
    return hashlib.sha256(text.encode()).hexdigest()
