"""How good a network is: a number from held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...errors import GraphPruneError
from ...importance.calibration import ONE_INPUT, CalibrationData, labels_of, logits_of
from ...support.restoring import restored
from ...support.unwrapping import no_model
from ...tracing.state import evaluating
from ...tracing.trace import run_model


class Evaluation:
    """A function of a model: a metric over held-out `data`, in eval mode and without gradients.

    `data` yields (inputs, targets), or dicts of keyword arguments, whose targets are their "labels". `metric`: None
    (default) for top-1 accuracy, the fraction of the items whose largest logit is the target's; or an object with
    `update(logits, targets)`, `compute()` and `reset()`, as the metrics of the torchmetrics library are. `name` is what
    reports call it.
    """

    def __init__(self, data: Any, metric: Any = None, name: str | None = None) -> None:
        missing = [m for m in ("update", "compute", "reset") if metric is not None and not hasattr(metric, m)]
        if missing:
            raise GraphPruneError(
                f"metric: expected an object with update, compute and reset, got {type(metric).__name__} without "
                f"{missing[0]}"
            )
        self._data = data
        self._metric = metric
        self.name = name or ("top-1 accuracy" if metric is None else type(metric).__name__)

    def __call__(self, model: nn.Module) -> float:
        """The metric of `model`; with top-1 accuracy between 0 and 1. The model and random states stay as they are."""
        if not isinstance(model, nn.Module):
            raise no_model(model, "model")
        metric = _Top1() if self._metric is None else self._metric
        metric.reset()
        with restored(model), evaluating(model):
            for inputs, targets in CalibrationData(self._data, ONE_INPUT, model):
                targets = labels_of(inputs, targets)
                if targets is None:
                    raise GraphPruneError("evaluate: its data yield no targets; yield (inputs, targets)")
                metric.update(logits_of(run_model(model, inputs, "evaluate")), targets)
        return float(metric.compute())


class _Top1:
    def reset(self) -> None:
        self._right = self._total = 0

    def update(self, logits: Tensor, targets: Any) -> None:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise GraphPruneError("evaluate: top-1 accuracy needs class numbers; pass Evaluation(data, metric)")
        guesses = logits.argmax(1)
        if guesses.shape != targets.shape:
            raise GraphPruneError(
                f"evaluate: logits of shape {tuple(logits.shape)} do not fit targets of shape {tuple(targets.shape)}"
            )
        self._right += int((guesses == targets).sum())
        self._total += targets.numel()

    def compute(self) -> float:
        return self._right / max(1, self._total)


def evaluator(evaluate: Any) -> Callable[[nn.Module], float] | None:
    """`evaluate` as a checked function: None, a function (model) -> number, or data for top-1 accuracy."""
    if evaluate is None:
        return None
    function = evaluate if callable(evaluate) else Evaluation(evaluate)

    def checked(model: nn.Module) -> float:
        with evaluating(model):
            value = function(model)
        number = float(value) if isinstance(value, (int, float, Tensor)) else math.nan
        if not math.isfinite(number):
            raise GraphPruneError(f"evaluate: expected it to return a finite number, got {value!r}")
        return number

    return checked


def metric_name(evaluate: Any) -> str:
    """What reports call the number that `evaluate` gives."""
    if callable(evaluate) and not isinstance(evaluate, Evaluation):
        return str(getattr(evaluate, "__name__", "score")).strip("<>").replace("lambda", "score")
    return evaluate.name if isinstance(evaluate, Evaluation) else "top-1 accuracy"
