"""Wrappers around a model that compute what the model inside computes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def inside(model: nn.Module) -> nn.Module | None:
    """The module inside one wrapper, or None where there is no wrapper."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and there if anything is compiled
    found: Any = None
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        found = model._orig_mod
    elif isinstance(model, (DataParallel, DistributedDataParallel)):
        found = model.module
    return found if isinstance(found, nn.Module) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and the data-parallel wrappers; a model without them as it is."""
    while (found := inside(model)) is not None:
        model = found
    return model
