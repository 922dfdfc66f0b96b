"""What the outputs decide: which of several numbers is the largest.

An error that is smaller need not be a network that does better. Where removal took away most of the spread of a
classifier's results, right means put the class that is largest on average first for nearly every input: the squared
error falls by half, and so does the accuracy. So a repair may not change more of the decisions than it puts right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Decisions count as lost where there are more than chance would lose, by so many standard errors: where a repair takes
# away half of the error and more it has to be sure, else one is enough.
_SURE, _LIKELY, _MUCH = 2.0, 1.0, 0.5


def choice_axis(answer: Tensor) -> int:
    """The axis of a network's answer along which numbers mean different things, as class scores (samples, classes) and
    (samples, places, classes): the last one, or with four axes and more axis 1, as of (samples, classes, height,
    width)."""
    return 1 if answer.dim() > 3 else max(answer.dim() - 1, 0)


def rightly_decided(found: Tensor, wanted: Tensor, samples: int) -> Tensor:
    """For each sample, in how many places the largest of `found` is the largest of `wanted`.

    The choice is along `choice_axis`. Zeros where there is nothing to choose.
    """
    axis = choice_axis(wanted)
    if wanted.dim() < 2 or wanted.shape[axis] < 2 or found.shape != wanted.shape or wanted.is_complex():
        return torch.zeros(samples, dtype=torch.float64)
    same = found.argmax(axis) == wanted.argmax(axis)
    return same.reshape(samples, -1).sum(1).double().cpu()


def decides_worse(now: Tensor, before: Tensor, error: float, before_error: float) -> bool:
    """Whether decisions were lost: right ones of each sample `now` and `before`, and the errors of the outputs."""
    change = now - before
    allowed = (_SURE if error <= _MUCH * before_error else _LIKELY) * math.sqrt(float(change.square().sum()))
    return float(change.sum()) < -allowed
