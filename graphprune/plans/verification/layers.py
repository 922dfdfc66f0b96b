"""The oracle of layer pruning: the original with the same layers bypassed, by hooks and without surgery."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...dependency.whole.blocks import Block
from ...dependency.whole.bypassing import changed, left_out
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from .results import Check, VerificationReport, relative_error
from .running import examples_for, run, same_shapes

# Nothing is computed anew: both networks run the same operations on the same numbers. What is left is the order in
# which a kernel sums, where the memory layout of the stream differs: some units of float32 (6e-8), carried through the
# layers that follow.
TOLERANCE = 1e-5


@contextlib.contextmanager
def bypassed(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """`model` with hooks that make each of these layers return what it was given, before any writing into it, and each
    of these branches zeros."""
    with changed(model, [(block, left_out(block)) for block in blocks]):
        yield model


def verify_layers(
    original: nn.Module, pruned: nn.Module, blocks: Sequence[Block], example_input: Any, tolerance: float = TOLERANCE
) -> VerificationReport:
    """Check that `pruned` is `original` without these layers.

    - *forward*: it runs and its outputs have the original's shapes.
    - *bypass*: on the example input, and on noise of the same shapes where all inputs are floating point, it computes
      what the original does with a hook on each layer that returns the layer's input (zeros for a branch): relative
      error at most `tolerance` (default 1e-5).
    - *weights*: what the original has outside these layers is all there, with the same values, and nothing else.
    """
    checks = []
    for number, one in enumerate(examples_for(ExampleInput.of(example_input))):
        got = run(pruned, one, "verify (pruned)")
        if not number:
            checks.append(same_shapes(got, run(original, one, "verify (original)")))
        with bypassed(original, blocks) as reference:
            wanted = run(reference, one, "verify (bypassed)")
        if any(p.is_meta for p in original.parameters()):
            continue
        error = relative_error(got, wanted)
        checks.append(Check("bypass" if not number else "bypass, noise", error <= tolerance, error))
    checks.append(_weights(original, pruned, blocks))
    return VerificationReport(tuple(checks))


def _weights(original: nn.Module, pruned: nn.Module, blocks: Sequence[Block]) -> Check:
    stays = [t for n, t in named_tensors(original).items() if not any(block.holds(n) for block in blocks)]
    found = list(named_tensors(pruned).values())
    same = len(stays) == len(found) and all(
        a.shape == b.shape and (a.is_meta or bool(torch.equal(a, b))) for a, b in zip(stays, found, strict=True)
    )
    return Check("weights", same, math.nan, f"{len(found)} tensors" if same else "what stays is not what was there")
