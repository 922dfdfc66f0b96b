"""Where criteria get what they know about data from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...plans.surgery import Fold, apply_folds
from ...support.types import LossFunction
from ...tracing.example import ExampleInput
from ...tracing.trace import record_run
from .data import CalibrationData
from .statistics import Calibration


@dataclasses.dataclass(frozen=True)
class CalibrationSource:
    """The caller's batches and loss function, not yet tied to a network."""

    example: ExampleInput
    data: CalibrationData
    loss_fn: LossFunction | None

    @classmethod
    def of(cls, model: nn.Module, example_input: Any, data: Any, loss_fn: Any) -> CalibrationSource | None:
        """None without data. Raises GraphPruneError for data in a form that is not accepted."""
        if data is None:
            return None
        example = ExampleInput.of(example_input)
        return cls(example, CalibrationData(data, example, model), loss_fn)

    def calibration(self, model: nn.Module, folds: Sequence[Fold]) -> Calibration:
        """On a copy of the model with these batch norms folded, as importance sees it."""
        folded = apply_folds(model, folds)
        return Calibration(folded, record_run(folded, self.example), self.data, self.loss_fn)
