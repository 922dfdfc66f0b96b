"""Corrections without data: what the network's stored statistics say of what was removed.

A layer that lost inputs misses, on average, its weights for them times their means. Behind batch norms these means are
known (see `importance/calibration/stored.py`), so the constant term can make up for them without a single input.

Its results also vary less than before, by the share of their variance that the lost inputs brought. What lies behind
was trained on the old variance, and layer after layer the signal fades. Where a batch norm stands behind the layer, the
mean around which its results vary is known too (the norm's shift), and they are spread around it as they were. For one
layer this adds squared error; for the accuracy of the network it was right wherever it was measured (docs/criteria.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ...importance.calibration import Reader, find_readers
from ...importance.calibration.stored import Spread, by_input, read_by, stored_spreads
from ...plans.plan import Plan
from ...plans.surgery import Fold, find_folds, fold_names
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.operators import multiplied, products_of
from ...tracing.trace import record_run
from ...tracing.work import macs_of
from . import walk
from .steps import LayerRecovery

NOTHING_KNOWN = "nothing is stored of the inputs that it lost (no batch norm before them): left alone"


def stores_statistics(model: nn.Module) -> bool:
    """Whether there may be anything to go by without data."""
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


class Compensation:
    """What stored statistics say of `plan`, on a network whose tensors have the names of `model`'s; `small`: what the
    plan makes of it."""

    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan, example: ExampleInput, new_bias: bool) -> None:
        self.plan, self.new_bias = plan, new_bias
        self.trace, after = record_run(model, example), record_run(small, example)
        self.lost = {r.weight: r for r in find_readers(self.trace) if plan.removed.get(r.weight, {}).get(r.in_axis)}
        self.calls = {name: list(self.trace.parameters[name].users) for name in self.lost}
        self.macs = sum(macs_of(node) or 0 for node in self.trace.graph.nodes if node.op == "call_function")
        self.read = frozenset(read_by(call) for called in self.calls.values() for call in called)
        self.readers = {r.weight: r for r in find_readers(after)}
        self.norms = {f.layer: f.batch_norm for f in find_folds(small, after)}
        self.behind = {fold_names(f)[0]: f for f in find_folds(model, self.trace)}

    def apply(self, model: nn.Module, dense: nn.Module, small: nn.Module, spread: bool) -> list[LayerRecovery]:
        """Correct `small` in place; `dense`: `model` with the plan's batch norms folded. `spread`: variances too."""
        named, plan = named_tensors(model), self.plan
        spreads = stored_spreads(self.trace, named, self.read)
        modules = dict(small.named_modules())
        norms = {layer: modules[norm] for layer, norm in self.norms.items()}
        weights = named_tensors(dense)
        report = []
        for name, reader in self.lost.items():
            calls = self.calls[name]
            changes = [_missed(reader, call, spreads.get(read_by(call)), weights[name], plan) for call in calls]
            said = _correct(small, self.readers.get(name), norms, plan, name, changes, self.new_bias)
            if spread and said.changed and len(calls) == 1 and name in self.behind:
                share = _lost_share(reader, spreads[read_by(calls[0])], named[name], plan)
                _spread_out(small, self.behind[name], share, named, plan, self.readers[name], modules)
                said = dataclasses.replace(said, method="moments")
            report.append(said)
        return report


# No result is spread by more than this factor squared: what lost nearly all of its variance has no signal to restore.
_LEAST = 0.05


def _lost_inputs(reader: Reader, weight: Tensor, plan: Plan) -> Tensor:
    """Which indices of the weight's input axis go."""
    lost = torch.zeros(weight.shape[reader.in_axis], dtype=torch.bool)
    lost[list(plan.removed[reader.weight][reader.in_axis])] = True
    return lost


def _lost_share(reader: Reader, spread: Spread, weight: Tensor, plan: Plan) -> Tensor:
    """The share of the variance of each result of the dense layer that the removed inputs bring, inputs independent;
    one number per output of the dense layer."""
    variance = by_input(reader, spread.variance, weight).to(weight.device)
    lost = _lost_inputs(reader, weight, plan).to(weight.device)
    squares = weight.detach().double().square().movedim((reader.out_axis, reader.in_axis), (0, 1))
    energy = squares.reshape(*squares.shape[:2], -1).sum(2) * variance
    total = energy.sum(1)
    share: Tensor = torch.where(total > 0, energy[:, lost].sum(1) / total.clamp_min(1e-300), 0.0)
    return share


def _spread_out(
    small: nn.Module,
    fold: Fold,
    share: Tensor,
    named: Mapping[str, Tensor],
    plan: Plan,
    reader: Reader,
    modules: Mapping[str, nn.Module],
) -> None:
    """Give the results behind `fold`'s batch norm their old variance: in its running variance, or where it is folded,
    in the layer's weights and bias, around the mean that the norm's shift is."""
    target = walk.target_of(plan, reader, share.device)
    if bool(share.isnan().any()) or not reader.separable or target.factors is not None:
        return
    left = (1 - share[target.kept]).clamp(_LEAST, 1)
    norm = modules.get(fold.batch_norm)
    variance = getattr(norm, "running_var", None)
    if isinstance(variance, Tensor):
        variance.mul_(left.to(variance.dtype))
        return
    after = named_tensors(small)
    weight_name, bias_name = fold_names(fold)
    weight, bias = after[weight_name], after.get(bias_name)
    if bias is None:
        return
    shift = named.get(f"{fold.batch_norm}.bias")
    middle = bias.new_zeros(len(bias)).double() if shift is None else shift.detach().double()
    if len(middle) != len(bias):
        middle = middle[target.kept]
    factor = left.rsqrt()
    view = [1] * weight.dim()
    view[reader.out_axis] = -1
    weight.data.copy_((weight.detach().double() * factor.reshape(view)).to(weight.dtype))
    bias.data.copy_((middle + factor * (bias.detach().double() - middle)).to(bias.dtype))


def _missed(reader: Reader, call: fx.Node, spread: Spread | None, weight: Tensor, plan: Plan) -> Tensor | None:
    """What the removed inputs add to each result of the dense layer, on average over samples and places, borders as
    they are; None where their means are not known."""
    if spread is None:
        return None
    gone = _lost_inputs(reader, weight, plan)
    view = [1] * weight.dim()
    view[reader.in_axis] = -1
    part = torch.where(gone.reshape(view).to(weight.device), weight.detach().double(), 0.0)
    mean = _of_removed(reader, spread.mean, gone).to(weight.device)
    result = multiplied(call, products_of(call)[0], mean, part)
    axis = reader.result_axis
    found: Tensor = result.movedim(axis, 0).reshape(result.shape[axis], -1).mean(1)
    return None if bool(found.isnan().any()) else found


def _of_removed(reader: Reader, mean: Tensor, gone: Tensor) -> Tensor:
    """The means of the removed inputs, 0 for all others: what is unknown counts only where it is missed."""
    axis = mean.dim() + reader.data_axis
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
