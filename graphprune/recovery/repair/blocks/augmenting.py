"""Inputs that a user's function has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....errors import GraphPruneError
from ....tracing.example import ExampleInput

Augment = Callable[[Any], Any]


def augmented(example: ExampleInput, augment: Augment | None) -> ExampleInput:
    """What `augment` makes of copies of the arguments: as many of them, and as many samples."""
    if augment is None:
        return example
    copied = example.clone()
    given = _as_given(copied)
    with torch.no_grad():
        made = augment(given)
    if not isinstance(made, type(given)):
        raise GraphPruneError(f"BlockFit: augment got {_said(given)} and must return one too, not {_said(made)}")
    found = ExampleInput.of(made)
    if len(found.args) != len(example.args) or found.kwargs.keys() != example.kwargs.keys():
        raise GraphPruneError(f"BlockFit: augment got {_arguments(example)} and returned {_arguments(found)}")
    if found.samples != example.samples:
        raise GraphPruneError(f"BlockFit: augment got {example.samples} samples and returned {found.samples}")
    return found


def _as_given(example: ExampleInput) -> Any:
    """In the form in which data come: a tensor, a tuple or a dict."""
    if example.kwargs:
        return dict(example.kwargs)
    alone = len(example.args) == 1 and isinstance(example.args[0], Tensor)
    return example.args[0] if alone else tuple(example.args)


def _said(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _arguments(example: ExampleInput) -> str:
    names = ", ".join(example.kwargs)
    return f"the arguments {names}" if names else f"{len(example.args)} arguments"
