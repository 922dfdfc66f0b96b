"""One step of a repair: layers get other values, and get back their own where that makes the outputs worse."""

from __future__ import annotations

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
    """Puts options in place in `small`, the best one first, and keeps what `check` lets pass.

    `constant`: where the constant term of a layer is.
    """

    def __init__(self, small: nn.Module, check: Check, constant: Callable[[Reader], Constant]) -> None:
        self.small, self.check, self.constant = small, check, constant

    def take(self, tried: Sequence[tuple[Reader, list[Option]]]) -> list[LayerRecovery]:
        """What was done to each layer: to all at once, or where that is worse than nothing, one by one."""
        saved = [self._saved(reader) for reader, _ in tried]
        for reader, options in tried:
            self._put(reader, options[0])
        if self.check.passes():
            return [options[0].said for _, options in tried]
        for restore in saved:
            restore()
        alone = len(tried) == 1
        return [self._first(reader, options, alone) for reader, options in tried]

    def _first(self, reader: Reader, options: list[Option], refused: bool) -> LayerRecovery:
        """Keep the first option that passes; `refused`: the very first has not."""
        notes: list[str] = []
        for number, option in enumerate(options):
            worse = self.check.last
            if number or not refused:
                restore = self._saved(reader)
                self._put(reader, option)
                if self.check.passes():
                    return dataclasses.replace(option.said, note="; ".join(n for n in (*notes, option.said.note) if n))
                restore()
                worse = self.check.last
            notes.append(
                f"{option.said.method} taken back: on held inputs the error of the outputs rose from "
                f"{self.check.error:.2e} to {worse:.2e}"
            )
        said = options[0].said
        return dataclasses.replace(said, method="none", after=said.before, note="; ".join(notes), changed=False)

    def _put(self, reader: Reader, option: Option) -> None:
        if option.weight is not None:
            named_tensors(self.small)[reader.weight].data.copy_(option.weight)
        if option.change is not None:
            self.constant(reader).add(option.change)

    def _saved(self, reader: Reader) -> Callable[[], None]:
        """Puts back what a step may change."""
        weight, constant = named_tensors(self.small)[reader.weight], self.constant(reader)
        before = [(t, t.detach().clone()) for t in (weight, constant.bias, constant.mean) if t is not None]

        def restore() -> None:
            for tensor, value in before:
                tensor.data.copy_(value)
            if constant.owner is not None:
                constant.owner.register_parameter("bias", None)

        return restore
