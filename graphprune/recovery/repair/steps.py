"""The steps of a repair: layers get other values, and get back their own where that makes the outputs worse.

Every step that makes the outputs worse is taken back at once. But what is right for a layer may be wrong for the
outputs until those behind it have been repaired too. So where some step was taken back, the repair is done once more
with all of them in place, and the better of the two networks is kept. If not even that is surely better than no repair,
by more than samples differ by chance, all is taken back.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from ...importance.calibration import Reader
from ...support.walking import tensor_named
from .checking import Check
from .walk import Constant


@dataclasses.dataclass(frozen=True)
class LayerRecovery:
    """What was done to one layer.

    `before`, `after`: mean squared difference to the wanted results on the calibration data, divided by their
    variance; NaN where not measured. `note` says what could not be done, what was taken back, and where a correction
    is not exact. `changed`: whether anything was done.
    """

    weight: str
    method: str
    before: float
    after: float
    note: str = ""
    changed: bool = True

    def __str__(self) -> str:
        note = f": {self.note}" if self.note else ""
        error = "" if math.isnan(self.before) else f", relative error {self.before:.2e} -> {self.after:.2e}"
        return f"{self.weight}: {self.method}{error}{note}"


def with_note(said: LayerRecovery, note: str) -> LayerRecovery:
    """The same, with a note more."""
    return dataclasses.replace(said, note="; ".join(n for n in (said.note, note) if n)) if note else said


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to repair a layer: its new weight, a change of its constant term, and what to say of it."""

    said: LayerRecovery
    weight: Tensor | None
    change: Tensor | None


class Options:
    """Ways to repair a layer, the best one first; each is worked out when it is asked for."""

    def __init__(self, options: Iterable[Option]) -> None:
        self._coming, self._known = iter(options), list[Option]()

    def __iter__(self) -> Iterator[Option]:
        yield from self._known
        for option in self._coming:
            self._known.append(option)
            yield option

    @property
    def first(self) -> Option:
        return next(iter(self))


class Steps:
    """Puts options in place in `small`, the best one first. `strict`: what `check` does not let pass is taken back at
    once, and `refused` says whether there was such a step; else all stays, and nothing is measured.

    `constant`: where the constant term of a layer is.
    """

    def __init__(self, small: nn.Module, check: Check, constant: Callable[[Reader], Constant]) -> None:
        self.small, self.check, self.constant = small, check, constant
        self.strict, self.refused = True, False
        self._first_values: dict[str, Values] = {}

    def take(self, tried: Sequence[tuple[Reader, Options]]) -> list[LayerRecovery]:
        """What was done to each layer: to all at once, or where that is worse than nothing, one by one."""
        saved = [Values(self.small, reader, self.constant(reader)) for reader, _ in tried]
        for (reader, options), values in zip(tried, saved, strict=True):
            self._first_values.setdefault(reader.weight, values)
            self._put(reader, options.first)
        if not self.strict or self.check.passes(at=tried[0][0].weight):
            return [options.first.said for _, options in tried]
        self.refused = True
        for values in saved:
            values.restore()
        alone = len(tried) == 1
        return [self._first(reader, options, alone) for reader, options in tried]

    def undo(self) -> list[Values]:
        """Take back everything; returns what puts it in place again."""
        done = [values.now() for values in self._first_values.values()]
        for values in self._first_values.values():
            values.restore()
        return done

    def _first(self, reader: Reader, options: Options, refused: bool) -> LayerRecovery:
        """Keep the first option that passes; `refused`: the very first has not."""
        notes: list[str] = []
        for number, option in enumerate(options):
            if number or not refused:
                values = Values(self.small, reader, self.constant(reader))
                self._put(reader, option)
                if self.check.passes(at=reader.weight):
                    return dataclasses.replace(option.said, note="; ".join(n for n in (*notes, option.said.note) if n))
                values.restore()
            notes.append(f"{option.said.method} taken back: {self.check.told(self.check.now, self.check.last)}")
        said = options.first.said
        return dataclasses.replace(said, method="none", after=said.before, note="; ".join(notes), changed=False)

    def _put(self, reader: Reader, option: Option) -> None:
        if option.weight is not None:
            tensor_named(self.small, reader.weight).data.copy_(option.weight)
        if option.change is not None:
            self.constant(reader).add(option.change)


class Values:
    """All that a step may change of one layer, as it is now."""

    def __init__(self, small: nn.Module, reader: Reader, constant: Constant) -> None:
        weight = tensor_named(small, reader.weight)
        self._owner = small.get_submodule(reader.weight.rpartition(".")[0])
        self._tensors = [t for t in (weight, constant.bias, constant.mean) if t is not None]
        self._added = constant.owner is not None  # the bias it may be given
        self._bias = self._owner._parameters.get("bias") if self._added else None
        self._values = [t.detach().clone() for t in self._tensors]

    def restore(self) -> None:
        """Put the values back."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.data.copy_(value)
        if self._added:
            self._owner.register_parameter("bias", self._bias)

    def now(self) -> Values:
        """The same, with the values of now."""
        new = copy.copy(self)
        new._values = [t.detach().clone() for t in self._tensors]
        new._bias = self._owner._parameters.get("bias") if self._added else None
        return new


def better_of_two(steps: Steps, run: Callable[[], list[LayerRecovery]]) -> list[LayerRecovery]:
    """Repair, and if some steps were taken back, once more with all in place; keep what is better, if that is surely
    better than what there was."""
    check, start = steps.check, steps.check.now
    report = run()
    # of the whole network, whatever was computed once for several steps
    careful = check.now = check.measured()
    if steps.refused:
        done = steps.undo()
        steps.strict = False
        second = run()
        reached = check.measured()
        better = reached.gain_over(careful)[0] > 0 and not reached.decides_worse_than(start)
        if better or not careful.surely_below(start):
            report, check.now = second, reached
        else:
            steps.undo()
            for values in done:
                values.restore()
    if check.now.surely_below(start):
        return report
    told = check.told(start, check.now)
    steps.undo()
    check.now = start
    return [_taken_back(said, told) if said.changed else said for said in report]


def _taken_back(said: LayerRecovery, told: str) -> LayerRecovery:
    note = "; ".join(n for n in (f"{said.method} taken back with all else: {told}", said.note) if n)
    return dataclasses.replace(said, method="none", after=said.before, note=note, changed=False)
