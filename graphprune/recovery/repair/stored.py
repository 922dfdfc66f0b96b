"""The "mean" correction without data: what the network's stored statistics say of what was removed.

A layer that lost inputs misses, on average, its weights for them times their means. Behind batch norms these means are
known (see `importance/calibration/stored.py`), so the constant term can make up for them without a single input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...importance.calibration import Reader, find_readers
from ...importance.calibration.stored import Spread, read_by, stored_spreads
from ...plans.plan import Plan
from ...plans.surgery import find_folds
from ...tracing.example import ExampleInput
from ...tracing.names import named_tensors, operator_name
from ...tracing.trace import record_run
from . import walk
from .layers import LayerRecovery

NOTHING_KNOWN = "nothing is stored of the inputs that it lost (no batch norm before them): left alone"


def stores_statistics(model: nn.Module) -> bool:
    """Whether there may be anything to go by without data."""
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


def compensate(
    model: nn.Module,
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    example: ExampleInput,
    new_bias: bool = True,
) -> list[LayerRecovery]:
    """Correct `small`, made from `model` by `plan`, in place; `dense`: `model` with the plan's batch norms folded."""
    trace = record_run(model, example)
    lost = {r.weight: r for r in find_readers(trace) if plan.removed.get(r.weight, {}).get(r.in_axis)}
    calls = {name: list(trace.parameters[name].users) for name in lost}
    read = frozenset(read_by(call) for called in calls.values() for call in called)
    spreads = stored_spreads(trace, named_tensors(model), read)
    after = record_run(small, example)
    readers = {r.weight: r for r in find_readers(after)}
    modules = dict(small.named_modules())
    norms = {f.layer: modules[f.batch_norm] for f in find_folds(small, after)}
    weights = named_tensors(dense)
    report = []
    for name, reader in lost.items():
        changes = [_missed(reader, call, spreads.get(read_by(call)), weights[name], plan) for call in calls[name]]
        report.append(_correct(small, readers.get(name), norms, plan, name, changes, new_bias))
    return report


def _missed(reader: Reader, call: fx.Node, spread: Spread | None, weight: Tensor, plan: Plan) -> Tensor | None:
    """What the removed inputs add to each result of the dense layer, on average over samples and places, borders as
    they are; None where their means are not known."""
    if spread is None:
        return None
    gone = torch.zeros(weight.shape[reader.in_axis], dtype=torch.bool)
    gone[list(plan.removed[reader.weight][reader.in_axis])] = True
    view = [1] * weight.dim()
    view[reader.in_axis] = -1
    part = torch.where(gone.reshape(view).to(weight.device), weight.detach().double(), 0.0)
    mean = _of_removed(reader, spread.mean, gone, weight.dim() - 2).to(weight.device)
    args: list[Any] = list(call.args)
    if operator_name(call) == "convolution":
        result = call.target(mean, part, None, *args[3:])  # type: ignore[operator]
        axis = result.dim() - (weight.dim() - 2) - 1
    else:
        result = mean @ (part.mT if reader.in_axis == 1 else part)
        axis = result.dim() - 1
    found: Tensor = result.movedim(axis, 0).reshape(result.shape[axis], -1).mean(1)
    return None if bool(found.isnan().any()) else found


def _of_removed(reader: Reader, mean: Tensor, gone: Tensor, kernel: int) -> Tensor:
    """The means of the removed inputs, 0 for all others: what is unknown counts only where it is missed."""
    axis = mean.dim() - 1 - (kernel if reader.convolution else 0)
    view = [1] * mean.dim()
    view[axis] = -1
    channels = gone.repeat(mean.shape[axis] // len(gone)) if len(gone) != mean.shape[axis] else gone
    return torch.where(channels.reshape(view).to(mean.device), mean, 0.0)


def _correct(
    small: nn.Module,
    reader: Reader | None,
    norms: dict[str, nn.Module],
    plan: Plan,
    name: str,
    changes: list[Tensor | None],
    new_bias: bool,
) -> LayerRecovery:
    """Put the mean of the changes (one per call of the layer) into its constant term."""
    known = [change for change in changes if change is not None]
    if reader is None or not known or len(known) < len(changes):
        return LayerRecovery(name, "mean", math.nan, math.nan, NOTHING_KNOWN, False)
    constant = walk.Constant(small, reader, norms.get(name.rpartition(".")[0]), new_bias)
    if not constant.possible:
        told = "has no bias and no batch norm behind it: left alone"
        return LayerRecovery(name, "mean", math.nan, math.nan, told, False)
    change = torch.stack(known).mean(0)
    constant.add(walk.target_of(plan, reader, change.device).of(change, 0))
    return LayerRecovery(name, "mean", math.nan, math.nan, "from stored statistics; exact on average, not at borders")
