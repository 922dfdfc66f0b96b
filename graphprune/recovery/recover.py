"""`recover`: give a pruned network its accuracy back, without labels and without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..calibration import CalibrationData
from ..errors import GraphPruneError
from ..plans import Plan, folding
from ..surgery import apply_folds
from ..tracing.example import ExampleInput
from .batchnorm import reestimate
from .layers import LayerRecovery, Refit

METHODS = ("mean", "batchnorm", "least_squares")


@dataclasses.dataclass(frozen=True)
class Recovery:
    """`model`: the recovered network. `layers`: what was done, layer by layer, in order (empty for "batchnorm")."""

    model: nn.Module
    layers: tuple[LayerRecovery, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def check_method(method: Any, data: Any) -> None:
    """Raise GraphPruneError unless `method` is None or known, and has the data it needs."""
    if method is None:
        return
    if method not in METHODS:
        known = ", ".join(map(repr, METHODS))
        raise GraphPruneError(f"recover: expected None or one of {known}, got {method!r}")
    if data is None:
        raise GraphPruneError(f"recover={method!r} needs inputs to measure on: pass data=, a loader or list of batches")


def recover(
    model: nn.Module,
    plan: Plan,
    example_input: Any,
    data: Any,
    method: str = "least_squares",
    *,
    ridge: float = 1e-3,
    every_layer: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Recovery:
    """Apply `plan` to a copy of `model` and repair the copy so that it does what `model` does on `data`.

    `data` yields inputs, or (inputs, targets) whose targets are not used; it is read several times, a batch at a time.
    `method`:

    - "mean": the constant term (bias) of every layer that lost inputs is moved so that its mean result is the dense
      network's. Exact for removed channels that are constant, except at the border of padded convolutions, where the
      report says so.
    - "batchnorm": batch norm statistics are estimated again on the pruned network (before folding), as cumulative
      averages over the batches.
    - "least_squares": every linear layer and convolution that lost inputs, and with `every_layer` those behind it, is
      refitted by ridge regression: inputs from the already repaired part of the pruned network, targets from the dense
      one, layer after layer (He et al., Channel Pruning, ICCV 2017; design with the residual stream's error in the
      target). `ridge`, times the mean second moment of the inputs, holds the weights to those they had.

    Memory is bounded by the moments of the layers fitted at a time (about 1 GiB); layers with more than 12,000 inputs
    per output and transposed convolutions of several groups get the "mean" correction, and the report says so.

    Raises GraphPruneError for unknown methods, for data that cannot be read twice or that the model fails on, and for
    plans of another model. `model` is not touched.
    """
    if method is None:
        raise GraphPruneError(f"recover: expected one of {', '.join(map(repr, METHODS))}, got None")
    check_method(method, data)
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not ridge >= 0:
        raise GraphPruneError(f"ridge: expected a number of at least 0, got {ridge!r}")
    example = ExampleInput.of(example_input)
    batches = CalibrationData(data, example, model)
    if any(p.is_meta for p in model.parameters()):
        raise GraphPruneError("recover: the model is on the meta device and has no values; load its weights first")
    with torch.no_grad():
        if method == "batchnorm":
            small = dataclasses.replace(plan, folds=()).apply(model)
            reestimate(small, batches)
            return Recovery(folding(small, plan.folds).apply(small), ())
        small = plan.apply(model)
        dense = apply_folds(model, plan.folds)  # a copy, also without folds
        refit = Refit(dense, small, plan, example, batches, float(ridge), every_layer, progress)
        return Recovery(small, tuple(refit.run(solve=method == "least_squares")))
