"""What training minimises: a loss of the outputs, and the distance from a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...importance.calibration import batch_loss, logits_of, loss_in
from ...support.types import LossFunction
from ...support.unwrapping import no_model
from ...tracing.example import ExampleInput
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .distillation import Distillation, Tap, feature_distance, logit_distance
from .losses import LossState


class Objective:
    """A scalar for a batch. `teacher` is run in eval mode on the same inputs; it is not changed.

    Without targets and without a loss function, a teacher alone is learnt from.
    """

    def __init__(
        self, loss_fn: LossFunction | None, teacher: nn.Module | None, distillation: Distillation | None
    ) -> None:
        if teacher is None and distillation is not None:
            raise GraphPruneError("distillation: needs a network to learn from; pass teacher=, the dense model")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise no_model(teacher, "teacher")
        if loss_fn is not None and not callable(loss_fn):
            raise GraphPruneError(f"loss_fn: expected a function (output, targets), got {type(loss_fn).__name__}")
        self._loss_fn = loss_fn
        self._teacher = teacher
        self._distillation = distillation or Distillation()
        self._taps: tuple[Tap, Tap] | None = None

    def state(self, *apart: nn.Module) -> LossState:
        """What the loss holds itself, without the teacher and these networks."""
        return LossState(self._loss_fn, (*apart, self._teacher))

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While inside, the features that distillation compares are seen in `model` and in the teacher."""
        names = self._distillation.features if self._teacher is not None else ()
        if not names:
            yield
            return
        assert self._teacher is not None
        with Tap(model, names, "model") as own, Tap(self._teacher, names, "teacher") as wanted:
            self._taps = own, wanted
            try:
                yield
            finally:
                self._taps = None

    def __call__(self, model: nn.Module, inputs: ExampleInput, targets: Any) -> Tensor:
        """The loss of one batch, for which the model is run once."""
        if self._teacher is None:
            return batch_loss(self._loss_fn, run_model(model, inputs, "training"), inputs, targets)
        with evaluating(self._teacher):
            wanted = run_model(self._teacher, inputs.clone(), "teacher")
        output = run_model(model, inputs, "training")
        settings = self._distillation
        loss = logit_distance(logits_of(output), logits_of(wanted), settings.temperature)
        if targets is not None or self._loss_fn is not None or loss_in(output) is not None:
            own = batch_loss(self._loss_fn, output, inputs, targets)
            loss = settings.weight * loss + (1 - settings.weight) * own
        if self._taps is not None and settings.features:
            mine, theirs = self._taps
            parts = [feature_distance(mine[n], theirs[n], settings.feature_loss, n) for n in settings.features]
            loss = loss + settings.feature_weight * torch.stack(parts).mean()
        return loss
