"""Every repair is checked on inputs that it has not seen: what makes the outputs worse is taken back."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...importance.calibration import CalibrationData, Reader, observe, without_loss
from ...importance.calibration.observe import refuse_infinite_call
from ...importance.calibration.replay import Replay
from ...importance.calibration.reruns import Reruns, Telling
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.state import evaluating, unfused
from ...tracing.trace import run_model
from .decisions import decides_worse, rightly_decided

# The share of the samples that is held from a repair, and how many are enough. Where a share is fewer than `_FEW`, half
# is held, up to that many: of 18 small networks, least squares from 16 samples made 3 worse (up to 7.6 times) on others
# where 2 samples were held, and none where 8 were; the mean error that was left fell from 0.21 to 0.15.
_SHARE, _ENOUGH, _FEW = 8, 256, 8

NO_OUTPUTS = "the outputs hold no numbers that can be compared"


class FitData:
    """The part of some data that a repair may see: all batches but the last ones, and of the one at the border the
    first samples. `held`: the rest, as it came first; `apart`: whether it is kept from the fit at all. Loaders that
    shuffle yield the same batches in every pass, so that what is held is never seen."""

    def __init__(self, data: CalibrationData, model: nn.Module) -> None:
        self._data, self._batches, self._cut, self.apart = data.repeating(), -1, 0, True
        sizes, tail = _looked_through(self._data)
        self._total = len(sizes)
        wanted = min(_ENOUGH, max(sum(sizes) // _SHARE, min(_FEW, sum(sizes) // 2)))
        self.held: list[ExampleInput] = []
        if len(sizes) >= _SHARE or (len(sizes) > 1 and sizes[-1] <= wanted):
            while not self.held or sum(example.samples for example in (*self.held, tail[-1])) <= wanted:
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
    def first_held(self) -> int:
        """The number of the first batch of which something is held."""
        return self._batches if self.apart else self._total - len(self.held)

    @property
    def samples(self) -> int:
        """How many are held."""
        return sum(example.samples for example in self.held)

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
        sizes.append(example.samples)
        tail.append(example)
        while len(tail) > 1 and sum(sizes[-len(tail) + 1 :]) >= _ENOUGH:
            tail.popleft()
    return sizes, tail


def _part(example: ExampleInput, first: int | None, last: int | None) -> ExampleInput:
    n = example.samples
    return example.map(lambda t: t[first:last] if t.dim() and t.shape[0] == n else t)


def _runs(model: nn.Module, example: ExampleInput) -> bool:
    """Whether a part of a batch is a batch."""
    try:
        with evaluating(model):
            run_model(model, example.clone(), "data")
    except GraphPruneError:
        return False
    return all(not t.dim() or t.shape[0] == example.samples for t in example.tensors())


# Gains below this share of the error have to be more than twice their standard error, as one in fifty is by chance
# alone. Larger ones do not: of few samples with long tails a standard error says little, and repairs that took away
# most of the error elsewhere had gains here of as little as one standard error. Of fewer than `_FEW` it says nothing.
_SMALL, _SURE = 0.05, 2.0


class Measured:
    """How far outputs are from those that are wanted. `misses`: squared differences, one row per output of the network
    and one column per sample (per batch where outputs do not count samples), divided by the squares of all that is
    wanted of the output; NaN where there is nothing to compare, infinite for outputs that are not finite. `right`: see
    `rightly_decided`; by default nothing is decided."""

    def __init__(self, misses: Tensor, right: Tensor | None = None) -> None:
        self._misses = misses
        self.right = misses.new_zeros(0) if right is None else right
        rows = misses.nansum(1)[~misses.isnan().all(1)] if misses.numel() else misses.new_zeros(0)
        self.error = float(rows.mean()) if len(rows) else math.nan

    def where(self, other: Measured) -> Measured:
        """The same, of what can be compared in both: lengths of outputs may follow from values."""
        return Measured(torch.where(other._misses.isnan(), math.nan, self._misses), self.right)

    def decides_worse_than(self, before: Measured) -> bool:
        """Whether decisions were lost, of samples that can be compared in both; see `decides_worse`."""
        ours, theirs = self.where(before), before.where(self)
        if len(self.right) != self._misses.shape[1] or len(before.right) != len(self.right):
            return False
        both = ~ours._misses.isnan().all(0)
        return decides_worse(self.right * both, before.right * both, ours.error, theirs.error)

    def gain_over(self, before: Measured) -> tuple[float, float]:
        """By how much the error is smaller than `before`, and the standard error of that over samples: 0 where nothing
        has changed, or where there is one sample alone."""
        both = ~(self._misses.isnan() | before._misses.isnan())
        infinite = [int((m[both] == math.inf).sum()) for m in (before._misses, self._misses)]
        if infinite[0] != infinite[1]:
            return math.copysign(math.inf, infinite[0] - infinite[1]), 0.0
        both &= self._misses.isfinite() & before._misses.isfinite()
        differences = torch.where(both, before._misses - self._misses, 0.0)[both.any(1)]
        found = differences[:, both.any(0)].sum(0) / max(len(differences), 1)
        spread = float(found.std()) * math.sqrt(len(found)) if len(found) > 1 else 0.0
        return float(found.sum()), spread

    def no_worse_than(self, before: Measured) -> bool:
        """Whether the error has not risen, and no decisions were lost."""
        return not self.gain_over(before)[0] < 0 and not self.decides_worse_than(before)

    def surely_below(self, before: Measured) -> bool:
        """Whether the error is smaller than `before`, by much or by more than chance would make it, and no decisions
        were lost; or nothing has changed."""
        gain, deviation = self.gain_over(before)
        if self.decides_worse_than(before):
            return False
        if gain == deviation == 0:
            return True
        sure = _SURE * deviation if self._misses.shape[1] >= _FEW else 0.0
        return gain > 0 and (gain >= _SMALL * before.error or gain > sure)


class Check:
    """How far the outputs of `small` are from those of `dense` on some inputs. `start`, `now`: as it was,
    and with all that is in place; `last`: with what was tried last.

    Where layers change in a known order (`follow`), what stands before those that have changed is computed once."""

    def __init__(self, dense: nn.Module, small: nn.Module, inputs: list[ExampleInput]) -> None:
        self.dense, self.small, self.inputs = dense, small, inputs
        self._reruns: Reruns | None = None
        self._levels: Mapping[str, int] = {}
        self._wanted = [list(map(_wide, _outputs(dense, example, None))) for example in inputs]
        places = max(map(len, self._wanted), default=0)
        self._whole = torch.zeros(places, 1, dtype=torch.float64)
        for wanted in self._wanted:
            for place, b in enumerate(wanted):
                self._whole[place] += float(torch.where(b.isfinite(), b, 0.0).abs().square().sum())
        self.start = self.now = self.last = self.measured()

    @property
    def errors(self) -> tuple[float, float]:
        """The squared error of all outputs, each divided by its squares, at the start and now; NaN where there are none
        to compare."""
        return self.start.where(self.now).error, self.now.where(self.start).error

    def follow(self, levels: Mapping[str, int]) -> None:
        """Layers will get other values in this order: weight -> number of the step."""
        weights = {name: t for name, t in named_tensors(self.small).items() if name in levels}
        self._levels, self._reruns = levels, Reruns(len(self.inputs), levels, weights)

    def _found(self, index: int, at: str | None) -> list[Tensor]:
        run = functools.partial(_outputs, self.small, self.inputs[index])
        if at is None or self._reruns is None:
            return list(map(_wide, run(None)))
        return list(map(_wide, self._reruns.results(self._levels[at], index, run)))

    def measured(self, at: str | None = None) -> Measured:
        """With what is in place now. `at`: the weight of a layer of the step that is under way; by default anything may
        have changed, and the network is run as a whole."""
        columns: list[Tensor] = []
        right = [torch.zeros(0, dtype=torch.float64)]
        for index, (example, wanted) in enumerate(zip(self.inputs, self._wanted, strict=True)):
            units = example.samples
            if not units or not all(b.dim() and b.shape[0] == units for b in wanted):
                units = 1
            right.append(torch.zeros(units, dtype=torch.float64))
            part = torch.full((len(self._whole), units), math.nan, dtype=torch.float64)
            for place, (a, b) in enumerate(zip(self._found(index, at), wanted, strict=False)):
                finite = b.isfinite()
                if a.shape == b.shape and (bool(finite.any()) or not b.numel()):
                    miss = torch.where(finite, a - b, 0.0).abs().square().reshape(units, b.numel() // units)
                    part[place] = miss.sum(1).nan_to_num(math.inf, math.inf).cpu()
                    if b.numel():
                        right[-1] += rightly_decided(a, b, units)
            columns.append(part)
        misses = torch.cat(columns, 1) / self._whole.clamp_min(1e-300) if columns else self._whole
        return Measured(misses, torch.cat(right))

    def refuse_infinite(self, readers: Sequence[Reader], first: int) -> None:
        """Raise GraphPruneError where outputs are not finite since layers are not, and name the batch; `first`: the
        number of the first one. Infinities alone may be meant, as in a mask."""
        for index, (example, wanted) in enumerate(zip(self.inputs, self._wanted, strict=True), first):
            if all(bool(b.isfinite().all()) for b in wanted):
                continue
            calls = observe(self.dense, readers, example, inputs=True, outputs=True)
            for reader in readers:
                for call in calls[reader.weight]:
                    refuse_infinite_call(reader, call, index)

    def passes(self, surely: bool = False, at: str | None = None) -> bool:
        """Whether the outputs are no worse than when last measured, or with `surely` surely better; if so, that is what
        counts from now on. Many small gains may be a sure one together. `at`: see `measured`."""
        self.last = self.measured(at)
        if self.last.surely_below(self.now) if surely else self.last.no_worse_than(self.now):
            self.now = self.last
            return True
        return False

    def told(self, before: Measured, after: Measured, where: str = "held inputs") -> str:
        """Why something was taken back. `where`: on what it was tried."""
        before, after = before.where(after), after.where(before)
        change = f"from {before.error:.2e} to {after.error:.2e}"
        if not after.gain_over(before)[0] > 0:
            return f"on {where} the error of the outputs rose {change}"
        if after.decides_worse_than(before):
            counts = [int(m.right.sum()) for m in (before, after)]
            return (
                f"on {where} the outputs were largest where the model's are {counts[0]} times before and "
                f"{counts[1]} times then"
            )
        return f"on {where} the error of the outputs fell {change}, no more than chance would make it"


def _outputs(net: nn.Module, example: ExampleInput, memory: Replay | None) -> list[Tensor]:
    watching = contextlib.nullcontext() if memory is None else memory.watching()
    with evaluating(net), unfused(), watching, contextlib.nullcontext() if memory is None else Telling(memory):
        made = run_model(net, example.clone(), "data")
    # what a memory is handed are the tensors that were made
    return [t for t in without_loss(result_tensors(made), made) if t.is_floating_point() or t.is_complex()]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
