"""Repairs by stored statistics, tried on a twin of the network before they are believed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import nn

from ...errors import GraphPruneError
from ...plans.plan import Plan
from ...plans.surgery import Fold, apply_folds
from ...tracing.example import ExampleInput
from .checking import NO_OUTPUTS, Check
from .likely import drawn, fresh, twin
from .steps import LayerRecovery, with_note
from .stored import Compensation

_LESSER = {"moments": ("moments", "mean"), "mean": ("mean",)}


@dataclasses.dataclass(frozen=True)
class Done:
    """`small`: the repaired network. `layers`: what was done. `method`: the one that was kept, "" for none. `before`,
    `after`: errors of the outputs of the twin, measured on `checked`; `unchecked`: why there are none."""

    small: nn.Module
    layers: tuple[LayerRecovery, ...]
    method: str
    before: float = math.nan
    after: float = math.nan
    checked: str = ""
    unchecked: str = ""


class WithoutData:
    """Repairs what `plan` makes of `model`; `folds`: batch norms that are folded in both."""

    def __init__(
        self, model: nn.Module, plan: Plan, example: ExampleInput, folds: Sequence[Fold], new_bias: bool
    ) -> None:
        self.model, self.plan, self.example, self.folds = model, plan, example, folds
        self._known = Compensation(model, plan.operated(model), plan, example, new_bias)

    def run(self, method: str) -> Done:
        """By `method`, or the part of it that is no worse for the twin."""
        small, said = self._repaired(self.model, method)
        if not any(layer.changed for layer in said):
            return Done(small, tuple(said), "")
        try:
            inputs = drawn(self.model, self.example, self._known.macs)
            unseen = fresh(self.model)
            other = self.model if unseen else twin(self.model, inputs)
            check = Check(apply_folds(other, self.folds), self.plan.operated(other), [inputs.example])
        except GraphPruneError as error:
            return Done(small, tuple(said), method, unchecked=str(error))
        if math.isnan(check.start.error):
            return Done(small, tuple(said), method, unchecked=NO_OUTPUTS)
        where = f"{inputs.example.samples} random samples" + ("" if unseen else " that have the stored statistics")
        before, notes = check.start, ""
        for name in _LESSER[method]:
            check.small, _ = self._repaired(other, name)
            after = check.measured()
            if not after.gain_over(before)[0] < 0:
                small, said = (small, said) if name == method else self._repaired(self.model, name)
                layers = tuple(with_note(layer, notes) if layer.changed else layer for layer in said)
                return Done(small, layers, name, before.error, after.error, where)
            notes += f"{'; ' if notes else ''}{name} taken back with all else: {check.told(before, after, where)}"
        layers = tuple(
            dataclasses.replace(layer, method="none", note=notes, changed=False) if layer.changed else layer
            for layer in said
        )
        return Done(self.plan.operated(self.model), layers, "", before.error, before.error, where)

    def _repaired(self, model: nn.Module, method: str) -> tuple[nn.Module, list[LayerRecovery]]:
        small = self.plan.operated(model)
        return small, self._known.apply(model, apply_folds(model, self.folds), small, method == "moments")
