"""What a runtime computes beside what the model does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..runtimes.adapters.workers import RemoteSession
from ..runtimes.parity import relative_error
from ..runtimes.sources import Answers


def compare(
    session: RemoteSession, tensors: Sequence[Tensor], answers: Answers, allowed: float | None, title: str
) -> tuple[float, float]:
    """max|runtime - torch| / max|torch|, and the root of the summed squares of the difference over those of torch's
    outputs; the largest over outputs.

    Raises:
        GraphPruneError: an output is missing, has another shape, is not finite where it should be, or differs by more
            than is `allowed` (None: by anything).
    """
    found = session.run(tensors)
    if len(found) != len(answers.tensors):
        raise GraphPruneError(
            f"no file was written: {title} gives {len(found)} outputs, the model {len(answers.tensors)}"
        )
    largest = squared = 0.0
    for name, got, wanted in zip(answers.names, found, answers.tensors, strict=True):
        if got.shape != wanted.shape:
            raise GraphPruneError(
                f"no file was written: output {name!r} has shape {tuple(got.shape)} in {title} and "
                f"{tuple(wanted.shape)} in torch"
            )
        counted = not wanted.is_floating_point()
        error = relative_error(got, wanted.to(got.dtype) if counted else wanted)
        if error > (math.inf if allowed is None else allowed) or (error == math.inf and not counted):
            raise GraphPruneError(
                f"no file was written: output {name!r} differs between {title} and torch by a relative error of "
                f"{error:.3g}, allowed {'is what is finite' if allowed is None else f'{allowed:.3g}'}; raise the "
                f"tolerance only if you know why"
            )
        largest = max(largest, error)
        squared = max(squared, _of_squares(got, wanted))
    return largest, squared


def _of_squares(got: Tensor, wanted: Tensor) -> float:
    a, b = got.double(), wanted.double()
    kept = torch.isfinite(b)
    scale = float(b[kept].square().sum().sqrt())
    return float((a[kept] - b[kept]).square().sum().sqrt()) / (scale or 1.0)
