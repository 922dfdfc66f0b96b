"""What training minimises: a loss of the outputs, and the distance from a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import GraphPruneError
from ...support.types import LossFunction
from ...support.unwrapping import no_model
from ...tracing.example import ExampleInput
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .distillation import Distillation, Tap, feature_distance, logit_distance
from .losses import LossState


def logits_of(output: Any) -> Tensor:
    """The scores among what a classifier returns: the tensor, `.logits`, ["logits"], ["out"] or the first of a tuple.

    Raises GraphPruneError where there are none.
    """
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise GraphPruneError(f"the model returns a {type(output).__name__} without logits; pass loss_fn(output, targets)")


def default_loss(output: Any, targets: Any) -> Tensor:
    """Cross-entropy of logits and class numbers; without targets, the loss that the model itself returns."""
    if targets is None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        raise GraphPruneError(
            "data: yields no targets, and the model returns no loss of its own; yield (inputs, targets), pass "
            "loss_fn, or pass a teacher to learn from"
        )
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        found = f"{targets.dtype} tensors" if isinstance(targets, Tensor) else type(targets).__name__
        raise GraphPruneError(f"data: targets are {found}, not class numbers; pass loss_fn(output, targets)")
    return F.cross_entropy(logits_of(output), targets)


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
            return self._own(run_model(model, inputs, "training"), targets)
        with evaluating(self._teacher):
            wanted = run_model(self._teacher, inputs.clone(), "teacher")
        output = run_model(model, inputs, "training")
        settings = self._distillation
        loss = logit_distance(logits_of(output), logits_of(wanted), settings.temperature)
        if targets is not None or self._loss_fn is not None:
            loss = settings.weight * loss + (1 - settings.weight) * self._own(output, targets)
        if self._taps is not None and settings.features:
            own, theirs = self._taps
            parts = [feature_distance(own[n], theirs[n], settings.feature_loss, n) for n in settings.features]
            loss = loss + settings.feature_weight * torch.stack(parts).mean()
        return loss

    def _own(self, output: Any, targets: Any) -> Tensor:
        if self._loss_fn is None:
            return default_loss(output, targets)
        try:
            loss = self._loss_fn(output, targets)
        except GraphPruneError:
            raise
        except Exception as error:
            raise GraphPruneError(f"loss_fn raised {type(error).__name__}: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise GraphPruneError(f"loss_fn: expected it to return a scalar tensor, got {found}")
        return loss.reshape(())
