"""What removing part of a group does to the network's outputs, measured by running the network."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..tracing.example import ExampleInput, flatten_tensors
from ..tracing.operators import Kind, function_name, named
from ..tracing.state import evaluating, unfused
from ..tracing.trace import run_model
from .calibration import Calibration, Reader, as_weight, without_loss

# The shares of a group that are taken away for a measurement, all but one unit at the end, and how many samples all
# measurements of a network run together; each runs at least 8 and at most 64.
SHARES = (0.25, 0.5, 0.75, 1.0)
_RUNS, _LEAST, _MOST = 16384, 8, 64


@dataclasses.dataclass(frozen=True)
class Reading:
    """One reader of a group: its weights (problems, features, outputs), the covariance of its inputs with the ridge
    on it, their mean (problems, features), and the features of each unit (units, k)."""

    reader: Reader
    matrix: Tensor
    covariance: Tensor
    mean: Tensor
    features: Tensor

    def without(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """The change of the weights, and of the constant term per output, when these units go and the others take
        over as well as they can (least squares)."""
        kept = torch.ones(self.matrix.shape[1], dtype=torch.bool, device=self.matrix.device)
        kept[self.features[units].flatten()] = False
        change = -self.matrix
        right = self.covariance[:, kept] @ self.matrix
        change[:, kept] += torch.linalg.solve(self.covariance[:, kept][:, :, kept], right)
        return change, -(self.mean[:, None] @ change)[:, 0]


class _Shifted(TorchFunctionMode):
    """Adds a constant to the results of the calls that read certain weights."""

    def __init__(self, shifts: Mapping[int, tuple[Reader, Tensor]]) -> None:
        super().__init__()
        self.shifts = shifts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = args if _declared(func) else args[1:]
        read = next((a for a in (*operands, *kwargs.values()) if id(a) in self.shifts), None)
        if read is None or not isinstance(out, Tensor):
            return out
        reader, shift = self.shifts[id(read)]
        return out + shift.to(out.dtype).reshape(-1, *[1] * (-1 - reader.result_axis))


def _declared(function: Any) -> bool:
    operator = named(function_name(function))
    return operator is not None and operator.kind is Kind.DECLARED


def _examples(calibration: Calibration) -> list[ExampleInput]:
    """The first samples, as many as the number of layers leaves time for."""
    left = min(_MOST, max(_LEAST, _RUNS // (len(SHARES) * max(1, len(calibration.readers)))))
    found = []
    for example in calibration.data.inputs():
        samples = _samples(example)
        found.append(example.map(functools.partial(_first, samples=samples, count=left)))
        left -= min(samples, left)
        if not left:
            break
    return found


def _samples(example: ExampleInput) -> int:
    return next((t.shape[0] for t in example.tensors() if t.dim()), 1)


def _first(tensor: Tensor, samples: int, count: int) -> Tensor:
    """The first items of what is as long as the batch."""
    return tensor[:count] if tensor.dim() and tensor.shape[0] == samples else tensor


def _outputs(calibration: Calibration) -> list[Tensor]:
    """What the network makes of a few samples: all floating point outputs of all batches."""
    out: list[Tensor] = []
    with torch.no_grad(), evaluating(calibration.model), unfused():
        for example in calibration.cached(_examples):
            made = run_model(calibration.model, example.clone(), "data")
            results = without_loss(flatten_tensors(made), made)
            out += [r.double() for r in results if r.is_floating_point()]
    return out


@contextlib.contextmanager
def _changed(calibration: Calibration, changes: Sequence[tuple[Reader, Tensor, Tensor]]) -> Iterator[None]:
    """The network with other weights and constant terms in some readers."""
    weights = [calibration.weights[reader.weight] for reader, _, _ in changes]
    before = [w.detach().clone() for w in weights]
    try:
        for w, (reader, change, _) in zip(weights, changes, strict=True):
            w.data.add_(as_weight(reader, change, w))
        with _Shifted({id(w): (r, s.flatten()) for w, (r, _, s) in zip(weights, changes, strict=True)}):
            yield
    finally:
        for w, old in zip(weights, before, strict=True):
            w.data.copy_(old)


def output_error(calibration: Calibration, readings: Sequence[Reading], units: Tensor) -> float:
    """Mean over samples of the squared change of all outputs when these units go from all their readers; NaN for a
    network without floating point outputs, or whose outputs change their shapes."""
    dense = calibration.cached(_outputs)
    with _changed(calibration, [(r.reader, *r.without(units)) for r in readings]):
        found = _outputs(calibration)
    if not dense or [t.shape for t in found] != [t.shape for t in dense]:
        return math.nan
    squares = sum(float((a - b).square().sum()) for a, b in zip(dense, found, strict=True))
    return squares / sum(_samples(example) for example in calibration.cached(_examples))


def measured_costs(
    calibration: Calibration, readings: Sequence[Reading], order: Sequence[int], costs: Sequence[float]
) -> list[float]:
    """`costs`, one per unit in the order in which they go, scaled piece by piece so that their sums are the errors of
    the network's outputs that are measured when that many units are gone; as they are where nothing can be measured."""
    device = readings[0].matrix.device
    ends = sorted({max(1, min(len(order) - 1, round(share * len(order)))) for share in SHARES})
    found = np.array(costs, np.float64)
    start, before, factor = 0, 0.0, 1.0
    for end in ends:
        error = output_error(calibration, readings, torch.tensor(order[:end], device=device))
        expected = float(found[start:end].sum())
        if math.isfinite(error) and expected > 0:
            factor = max(error - before, 0.0) / expected
        found[start:end] *= factor
        start, before = end, max(before, error) if math.isfinite(error) else before
    found[start:] *= factor
    return [float(cost) for cost in found]
