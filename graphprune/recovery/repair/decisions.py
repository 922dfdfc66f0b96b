"""What the outputs decide: which of several numbers is the largest.

An error that is smaller need not be a network that does better. Where removal took away most of the spread of a
classifier's results, right means put the class that is largest on average first for nearly every input: the squared
error falls by half, and so does the accuracy. So a repair may not change more of the decisions than it puts right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Where a repair takes away half of the error and more, decisions have to be lost by more than chance would lose them:
# by this many standard errors. Else none may be lost on the whole.
_SURE, _MUCH = 2.0, 0.5


def rightly_decided(found: Tensor, wanted: Tensor, samples: int) -> Tensor:
    """For each sample, in how many places the largest of `found` is the largest of `wanted`.

    The choice is among the last axis, as of class scores (samples, classes) and (samples, places, classes), or with
    four axes and more among axis 1, as of (samples, classes, height, width). Zeros where there is nothing to choose.
    """
    axis = wanted.dim() - 1 if wanted.dim() < 4 else 1
    if wanted.dim() < 2 or wanted.shape[axis] < 2 or found.shape != wanted.shape:
        return torch.zeros(samples, dtype=torch.float64)
    same = found.argmax(axis) == wanted.argmax(axis)
    return same.reshape(samples, -1).sum(1).double().cpu()


def decides_worse(now: Tensor, before: Tensor, error: float, before_error: float) -> bool:
    """Whether decisions were lost: right ones of each sample `now` and `before`, and the errors of the outputs."""
    change = now - before
    allowed = _SURE * math.sqrt(float(change.square().sum())) if error <= _MUCH * before_error else 0.0
    return float(change.sum()) < -allowed
