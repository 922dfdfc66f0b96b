"""The steps of a repair: layers get other values, and get back their own where that makes the outputs worse.

What is right for a layer may be wrong for the outputs until those behind it have been repaired too. So nothing is taken
back at first. Only if some step made the outputs worse, the repair is done once more, now with such steps taken back at
once, and the better of the two networks is kept: never one that is worse than without repair.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ...importance.calibration import Reader
from ...support.walking import named_tensors
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


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to repair a layer: its new weight, a change of its constant term, and what to say of it."""

    said: LayerRecovery
    weight: Tensor | None
    change: Tensor | None


class Steps:
    """Puts options in place in `small`, the best one first. `strict`: what `check` does not let pass is taken back at
    once; else all stays, and `rose` says whether the outputs got worse on the way.

    `constant`: where the constant term of a layer is.
    """

    def __init__(self, small: nn.Module, check: Check, constant: Callable[[Reader], Constant]) -> None:
        self.small, self.check, self.constant = small, check, constant
        self.strict, self.rose = False, False
        self._first_values: dict[str, Values] = {}

    def take(self, tried: Sequence[tuple[Reader, list[Option]]]) -> list[LayerRecovery]:
        """What was done to each layer: to all at once, or where that is worse than nothing, one by one."""
        saved = [Values(self.small, reader, self.constant(reader)) for reader, _ in tried]
        for (reader, options), values in zip(tried, saved, strict=True):
            self._first_values.setdefault(reader.weight, values)
            self._put(reader, options[0])
        before, passed = self.check.now, self.check.passes()
        if passed or not self.strict:
            self.check.now = self.check.last
            self.rose |= self.check.error > before.error
            return [options[0].said for _, options in tried]
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

    def _first(self, reader: Reader, options: list[Option], refused: bool) -> LayerRecovery:
        """Keep the first option that passes; `refused`: the very first has not."""
        notes: list[str] = []
        for number, option in enumerate(options):
            if number or not refused:
                values = Values(self.small, reader, self.constant(reader))
                self._put(reader, option)
                if self.check.passes():
                    return dataclasses.replace(option.said, note="; ".join(n for n in (*notes, option.said.note) if n))
                values.restore()
            notes.append(
                f"{option.said.method} taken back: on held inputs {self.check.last.worse_than(self.check.now)}"
            )
        said = options[0].said
        return dataclasses.replace(said, method="none", after=said.before, note="; ".join(notes), changed=False)

    def _put(self, reader: Reader, option: Option) -> None:
        if option.weight is not None:
            named_tensors(self.small)[reader.weight].data.copy_(option.weight)
        if option.change is not None:
            self.constant(reader).add(option.change)


class Values:
    """All that a step may change of one layer, as it is now."""

    def __init__(self, small: nn.Module, reader: Reader, constant: Constant) -> None:
        weight = named_tensors(small)[reader.weight]
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
    """Repair, and if the outputs got worse on the way, once more with such steps taken back; keep what is better."""
    check, start = steps.check, steps.check.now
    first = run()
    if not steps.rose and not check.now.worse_than(start):
        return first
    done, reached = steps.undo(), check.now
    check.now, steps.strict = start, True
    second = run()
    if reached.error < check.error and not reached.worse_than(start):
        steps.undo()
        for values in done:
            values.restore()
        check.now = reached
        return first
    return second
