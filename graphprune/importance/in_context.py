"""What removing part of a group does to the network's outputs, measured by running the network."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..support.progress import stage
from ..tracing.example import ExampleInput, flatten_tensors
from ..tracing.operators import Kind, function_name, named
from ..tracing.state import evaluating, unfused
from ..tracing.trace import run_model
from .calibration import Calibration, Reader, as_weight, without_loss
from .calibration.replay import Replay
from .calibration.reruns import Reruns, Telling
from .elimination import Elimination, Quadratic

# The shares of a group that are taken away for a measurement, all but one unit at the end. How many samples all
# measurements of a network run together, and how many multiply-accumulates they may cost; each runs at least 8 and at
# most 64 samples. Where 8 samples cost more than that, fewer shares are measured.
SHARES, FEW_SHARES = (0.25, 0.5, 0.75, 1.0), (0.5, 1.0)
_RUNS, _LEAST, _MOST = 16384, 8, 64
_WORK = 1 << 40


@dataclasses.dataclass(frozen=True)
class Reading:
    """One reader of a group: its weights (problems, features, outputs) in their own precision, float32 at least, the
    covariance of its inputs with the ridge on it, their mean (problems, features), both in float64, and the features of
    each unit (units, k)."""

    reader: Reader
    matrix: Tensor
    quadratic: Quadratic
    mean: Tensor
    features: Tensor


class Change(NamedTuple):
    """Other values for a layer: what its weights (problems, features, outputs) and constant terms (problems, outputs)
    gain."""

    reader: Reader
    weights: Tensor
    shift: Tensor


class Runs:
    """The network's outputs on a few samples, as it is and with other values in some layers.

    What stands before the first layer that changes is computed once, as long as layers are asked for in their order.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._examples = _examples(calibration)
        self._levels = {name: number for number, name in enumerate(calibration.readers)}
        weights = {name: calibration.weights[name] for name in self._levels}
        self._reruns = Reruns(len(self._examples), self._levels, weights)
        self.samples = sum(example.samples for example in self._examples)
        self.dense = self._outputs(0)

    def error(self, changes: Sequence[Change]) -> float:
        """Mean over samples of the squared change of all outputs; NaN for a network without floating point outputs, or
        whose outputs change their shapes."""
        if not self.dense:
            return math.nan
        with _changed(self._calibration, changes) as shifts:
            found = self._outputs(min(self._levels[change.reader.weight] for change in changes), shifts)
        if [t.shape for t in found] != [t.shape for t in self.dense]:
            return math.nan
        squares = sum(float((a - b).square().sum()) for a, b in zip(self.dense, found, strict=True))
        return squares / self.samples

    def _outputs(self, first: int, shifts: Mapping[int, tuple[Reader, Tensor]] | None = None) -> list[Tensor]:
        """All floating point outputs of all batches, where nothing before this level has changed."""
        out: list[Tensor] = []
        for index, example in enumerate(self._examples):
            run = functools.partial(self._run, example, shifts or {})
            out += [t.double() for t in self._reruns.results(first, index, run)]
        return out

    def _run(
        self, example: ExampleInput, shifts: Mapping[int, tuple[Reader, Tensor]], memory: Replay | None
    ) -> list[Tensor]:
        model = self._calibration.model
        watching = contextlib.nullcontext() if memory is None else memory.watching()
        with torch.no_grad(), evaluating(model), unfused(), watching, _Shifted(shifts, memory):
            made = run_model(model, example.clone(), "data")
        return [r for r in without_loss(flatten_tensors(made), made) if r.is_floating_point()]


class _Shifted(Telling):
    """Adds a constant to the results of the calls that read certain weights."""

    def __init__(self, shifts: Mapping[int, tuple[Reader, Tensor]], memory: Replay | None) -> None:
        super().__init__(memory)
        self.shifts = shifts

    def made(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if not self.shifts:
            return out
        operands = args if _declared(func) else args[1:]
        read = next((a for a in (*operands, *kwargs.values()) if id(a) in self.shifts), None)
        if read is None or not isinstance(out, Tensor):
            return out
        reader, shift = self.shifts[id(read)]
        return out + shift.to(out.dtype).reshape(-1, *[1] * (-1 - reader.result_axis))


def _declared(function: Any) -> bool:
    operator = named(function_name(function))
    return operator is not None and operator.kind is Kind.DECLARED


def _affordable(calibration: Calibration) -> tuple[tuple[float, ...], int]:
    """The shares that are measured, and on how many samples."""
    runs = len(SHARES) * max(1, len(calibration.readers))
    samples = int(_WORK / max(1.0, runs * calibration.macs_per_sample))
    if samples < _LEAST:
        return FEW_SHARES, _LEAST
    return SHARES, min(_MOST, samples, max(_LEAST, _RUNS // runs))


def _examples(calibration: Calibration) -> list[ExampleInput]:
    """The first samples, as many as the network leaves time for."""
    left = calibration.cached(_affordable)[1]
    found = []
    for example in calibration.data.inputs():
        samples = example.samples
        found.append(example.map(functools.partial(_first, samples=samples, count=left)))
        left -= min(samples, left)
        if not left:
            break
    return found


def _first(tensor: Tensor, samples: int, count: int) -> Tensor:
    """The first items of what is as long as the batch."""
    return tensor[:count] if tensor.dim() and tensor.shape[0] == samples else tensor


@contextlib.contextmanager
def _changed(
    calibration: Calibration, changes: Sequence[Change]
) -> Iterator[Mapping[int, tuple[Reader, Tensor]]]:
    """The network with other weights in some readers, and the constants to be added to their results."""
    weights = [calibration.weights[change.reader.weight] for change in changes]
    before = [w.detach().clone() for w in weights]
    try:
        for w, change in zip(weights, changes, strict=True):
            w.data.add_(as_weight(change.reader, change.weights, w))
        yield {id(w): (change.reader, change.shift.flatten()) for w, change in zip(weights, changes, strict=True)}
    finally:
        for w, old in zip(weights, before, strict=True):
            w.data.copy_(old)


def refitted(readings: Sequence[Reading], elimination: Elimination) -> list[Change]:
    """What the readers gain when the units that went so far are gone and the others take over as well as they can
    (least squares)."""
    changes = elimination.refits()
    return [
        Change(reading.reader, change, -(reading.mean[:, None].to(change.dtype) @ change)[:, 0])
        for reading, change in zip(readings, changes, strict=True)
    ]


def measured_costs(
    calibration: Calibration, readings: Sequence[Reading], elimination: Elimination, units: int
) -> tuple[list[int], list[float]]:
    """The order in which the units go and what each costs, scaled piece by piece so that the sums are the errors of
    the network's outputs that are measured when that many units are gone; as they are where nothing can be measured."""
    runs = calibration.cached(Runs)
    ends = sorted({max(1, min(units - 1, round(share * units))) for share in calibration.cached(_affordable)[0]})
    errors = []
    with stage("measuring", len(ends), "shares of a group") as now:
        for end in ends:
            elimination.until(end)
            errors.append(runs.error(refitted(readings, elimination)))
            now.advance()
    order, costs = elimination.finish()
    return order, scaled(costs, ends, errors)


def scaled(costs: Sequence[float], ends: Sequence[int], errors: Sequence[float]) -> list[float]:
    """`costs`, scaled piece by piece so that their sums up to `ends` are `errors`, and never fall."""
    found = np.array(costs, np.float64)
    start, before, factor = 0, 0.0, 1.0
    for end, error in zip(ends, errors, strict=True):
        expected = float(found[start:end].sum())
        if math.isfinite(error) and expected > 0:
            factor = max(error - before, 0.0) / expected
        found[start:end] *= factor
        start, before = end, max(before, error) if math.isfinite(error) else before
    found[start:] *= factor
    return [float(cost) for cost in found]
