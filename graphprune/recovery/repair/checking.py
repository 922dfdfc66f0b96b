"""Every repair is checked on inputs that it has not seen: what makes the outputs worse is taken back."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...importance.calibration import CalibrationData, without_loss
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .decisions import decides_worse, rightly_decided

# The share of the samples that is held from a repair, and how many are enough.
_SHARE, _ENOUGH = 8, 256


class FitData:
    """The part of some data that a repair may see: all batches but the last ones, and of the one at the border the
    first samples. `held`: the rest, as it came first; `apart`: whether it is kept from the fit at all."""

    def __init__(self, data: CalibrationData, model: nn.Module) -> None:
        self._data, self._batches, self._cut, self.apart = data, -1, 0, True
        sizes, tail = _looked_through(data)
        wanted = min(_ENOUGH, sum(sizes) // _SHARE)
        self.held: list[ExampleInput] = []
        if len(sizes) >= _SHARE:
            while not self.held or sum(map(samples, (*self.held, tail[-1]))) <= wanted:
                self.held.insert(0, tail.pop())
                if not tail:
                    break
            self._batches = len(sizes) - len(self.held)
        elif wanted and sizes[-1] > wanted and _runs(model, last := _part(tail[-1], sizes[-1] - wanted, None)):
            self.held = [last]
            self._batches, self._cut = len(sizes) - 1, sizes[-1] - wanted
        elif len(sizes) > 1 and sizes[-1] <= sum(sizes) // 2:
            self.held, self._batches = [tail[-1]], len(sizes) - 1
        else:
            self.held, self._batches, self.apart = list(tail), len(sizes), False

    @property
    def samples(self) -> int:
        """How many are held."""
        return sum(map(samples, self.held))

    @property
    def said(self) -> str:
        """What the repair is checked on."""
        return f"{self.samples} {'held' if self.apart else 'of the same'} samples"

    def inputs(self) -> Iterator[ExampleInput]:
        """What the repair sees."""
        for index, example in enumerate(self._data.inputs()):
            if index < self._batches:
                yield example
            elif index == self._batches and self._cut:
                yield _part(example, None, self._cut)


def _looked_through(data: CalibrationData) -> tuple[list[int], deque[ExampleInput]]:
    """The sizes of all batches, and the last of them."""
    sizes: list[int] = []
    tail: deque[ExampleInput] = deque()
    for example in data.inputs():
        sizes.append(samples(example))
        tail.append(example)
        while len(tail) > 1 and sum(sizes[-len(tail) + 1 :]) >= _ENOUGH:
            tail.popleft()
    return sizes, tail


def samples(example: ExampleInput) -> int:
    """The length of a batch."""
    return next((t.shape[0] for t in example.tensors() if t.dim()), 1)


def _part(example: ExampleInput, first: int | None, last: int | None) -> ExampleInput:
    n = samples(example)
    return example.map(lambda t: t[first:last] if t.dim() and t.shape[0] == n else t)


def _runs(model: nn.Module, example: ExampleInput) -> bool:
    """Whether a part of a batch is a batch."""
    try:
        with evaluating(model):
            run_model(model, example.clone(), "data")
    except GraphPruneError:
        return False
    return all(not t.dim() or t.shape[0] == samples(example) for t in example.tensors())


@dataclasses.dataclass(frozen=True)
class Measured:
    """How the outputs are. `error`: the squared error of all that are floating point, each divided by its squares;
    infinite for NaN, and NaN where there are none to compare. `right`: see `rightly_decided`."""

    error: float
    right: Tensor

    def worse_than(self, before: Measured) -> str:
        """In which way, as a sentence goes on behind "on held inputs"; "" for no worse."""
        if self.error > before.error:
            return f"the error of the outputs rose from {before.error:.2e} to {self.error:.2e}"
        if decides_worse(self.right, before.right, self.error, before.error):
            counts = [int(m.right.sum()) for m in (before, self)]
            return f"the outputs were largest where the model's are {counts[0]} times before and {counts[1]} times then"
        return ""


class Check:
    """How far the outputs of `small` are from those of `dense` on some inputs. `now`: with all that has passed;
    `last`: with what was tried last."""

    def __init__(self, dense: nn.Module, small: nn.Module, inputs: list[ExampleInput]) -> None:
        self.small, self.inputs = small, inputs
        self._wanted = [_outputs(dense, example) for example in inputs]
        self.now = self.last = self.measured()

    @property
    def error(self) -> float:
        """The error of what has passed."""
        return self.now.error

    def measured(self) -> Measured:
        """With what is in place now."""
        sums: dict[int, tuple[float, float]] = {}
        right = [torch.zeros(0, dtype=torch.float64)]
        for example, wanted in zip(self.inputs, self._wanted, strict=True):
            units = samples(example) if all(b.dim() and b.shape[0] == samples(example) for b in wanted) else 1
            right.append(torch.zeros(units, dtype=torch.float64))
            for place, (a, b) in enumerate(zip(_outputs(self.small, example), wanted, strict=False)):
                if a.shape == b.shape and bool(torch.isfinite(b).all()):
                    miss, whole = sums.get(place, (0.0, 0.0))
                    sums[place] = miss + float((a - b).square().sum()), whole + float(b.square().sum())
                    right[-1] += rightly_decided(a, b, units)
        if not sums:
            return Measured(math.nan, torch.cat(right))
        found = sum(miss / max(whole, 1e-300) for miss, whole in sums.values()) / len(sums)
        return Measured(found if math.isfinite(found) else math.inf, torch.cat(right))

    def passes(self) -> bool:
        """Whether the outputs are no worse than when last measured; if so, that is what counts from now on."""
        self.last = self.measured()
        if self.last.worse_than(self.now):
            return False
        self.now = self.last
        return True


def _outputs(net: nn.Module, example: ExampleInput) -> list[Tensor]:
    with evaluating(net):
        made = run_model(net, example.clone(), "data")
        found = without_loss(result_tensors(made), made)
    return [t.double() for t in found if t.is_floating_point()]
