"""`fold_conv_bn`: merge batch norms into the layers before them, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..dependency.reparametrised import plain
from ..support.doors import door
from ..tracing.trace import record_run
from .plan import folding
from .surgery import find_folds


@door("model")
def fold_conv_bn(model: nn.Module, example_input: Any) -> nn.Module:
    """A copy of `model` with every foldable batch norm merged into the layer before it and replaced by nn.Identity.

    Decided by the data flow of one recorded run, not by module order: only where a convolution (plain, transposed,
    grouped, depthwise) or linear layer feeds that batch norm alone, and the batch norm is a plain one: no class with an
    activation of its own, no hooks. Uses the running statistics, so the result equals the original in eval mode. A
    layer without bias gets one.

    Raises GraphPruneError when the model fails on the example input.
    """
    bare = plain(model)
    return folding(model, find_folds(bare, record_run(bare, example_input))).apply(model)
