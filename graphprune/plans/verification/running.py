"""How networks are run to be compared: which inputs, in which state, and what the outputs must look like."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.interrupts import interruptible, shielded
from ...support.restoring import restored
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.state import RandomState, evaluating
from ...tracing.trace import run_model
from .precision import Computing
from .results import Check


def examples_for(example: ExampleInput) -> list[ExampleInput]:
    """The example, and where all of it is floating point noise of the same shapes around it."""
    if not all(t.is_floating_point() for t in example.tensors()):
        return [example]
    generator = torch.Generator().manual_seed(0)
    return [example, example.map(lambda t: _noise(t, generator))]


def same_shapes(got: Any, want: Any) -> Check:
    """The check that outputs have the shapes of the original's."""
    found, expected = ([tuple(t.shape) for t in result_tensors(out)] for out in (got, want))
    detail = f"{len(found)} outputs" if found == expected else f"output shapes {found}, expected {expected}"
    if not expected:  # equal, and nothing is known
        detail = "no tensor was found in what the model returns; return tensors, in tuples, dicts or objects"
    return Check("forward", found == expected and bool(expected), math.nan, detail)


def does_not_run(name: str, error: GraphPruneError) -> Check:
    """The check of a network that ends in an error, of which the state says what is wrong with it."""
    return Check(name, False, math.nan, "; ".join(line.strip() for line in str(error).splitlines()[:2]))


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return tensor.detach().clone() if tensor.is_meta else tensor.detach() + noise


def run(model: nn.Module, example: ExampleInput, what: str, dtype: torch.dtype | None = None) -> Any:
    """One run in eval mode without gradients, from the same random state each time; `dtype`: all in this precision.
    What the model's code keeps of it does not stay."""
    computing = contextlib.nullcontext() if dtype is None else Computing(dtype)
    with shielded(), restored(model), evaluating(model):
        before = RandomState(named_tensors(model).values())
        try:
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            with interruptible(), computing:
                return run_model(model, example.clone(), what)
        finally:
            before.put_back(drawn=True)
