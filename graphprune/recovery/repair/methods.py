"""`recover`: give a pruned network its accuracy back, without labels and without training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ...dependency.reparametrised import plain
from ...errors import GraphPruneError
from ...importance.calibration import CalibrationData, find_readers
from ...plans.history import remember, renewed
from ...plans.naming import in_plain_names
from ...plans.plan import Plan, check_plan
from ...plans.surgery import Fold, apply_folds, close_gaps, find_folds, worn
from ...support.doors import door
from ...support.numbers import check_number
from ...support.progress import ProgressOption, reported
from ...support.suggestions import check_choice
from ...synthesis import made_for
from ...tracing.example import ExampleInput
from ...tracing.trace import record_run
from .batchnorm import reestimate
from .blocks import BlockFit
from .by_blocks import repair_blocks
from .checking import NO_OUTPUTS, Check, FitData
from .layers import Refit
from .norms import kept_folds, take_apart
from .steps import LayerRecovery
from .stored import stores_statistics
from .without_data import WithoutData

METHODS = ("auto", "mean", "moments", "batchnorm", "least_squares", "blocks")
_DATA_FREE = ("auto", "mean", "moments")


@dataclasses.dataclass(frozen=True)
class Recovery:
    """`model`: the recovered network. `layers`: what was done, layer by layer, in order (for "batchnorm" empty, or what
    was taken back).

    `before`, `after`: squared error of the outputs, divided by their squares, on `checked` (inputs that were held from
    the repair; without data random ones, in a network with the same weights that stores their statistics); NaN where
    nothing was measured, and then `unchecked` says why.

    The network remembers the method, `graphprune.verify` says that it does, and files of `graphprune.save` say so;
    unless nothing was changed."""

    model: nn.Module
    layers: tuple[LayerRecovery, ...]
    before: float = math.nan
    after: float = math.nan
    checked: str = ""
    unchecked: str = ""

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        if self.layers and not any(layer.changed for layer in self.layers):
            lines.append("nothing was repaired")
        elif self.unchecked:
            lines.append(f"not checked: {self.unchecked}")
        elif not math.isnan(self.before):
            lines.append(f"error of the outputs on {self.checked}: {self.before:.2e} -> {self.after:.2e}")
        return "\n".join(lines)


def check_method(method: Any, data: Any) -> None:
    """Raise GraphPruneError unless `method` is None, known or a `BlockFit`, and has the data it needs."""
    if method is None:
        return
    method = name_of(method)
    check_choice("recover", method, (None, *METHODS), "a BlockFit")
    if data is None and method not in _DATA_FREE:
        raise GraphPruneError(f"recover={method!r} needs inputs to measure on: pass data=, a loader or list of batches")


def name_of(method: str | BlockFit) -> str:
    """The name of a method that may be given by its settings."""
    return "blocks" if isinstance(method, BlockFit) else method


@door("model", exact=True)
@reported("repairing")
def recover(
    model: nn.Module,
    plan: Plan,
    example_input: Any,
    data: Any = None,
    method: str | BlockFit = "auto",
    *,
    ridge: float = 1e-3,
    every_layer: bool = True,
    new_bias: bool | None = None,
    progress: ProgressOption = None,
) -> Recovery:
    """Apply `plan` to a copy of `model` and repair the copy so that it does what `model` does on `data`.

    `data` yields inputs, or (inputs, targets) whose targets are not used; it is read several times, a batch at a time.
    `graphprune.Synthetic()` stands for inputs that are made from `model`.
    `method` ("auto", the default: "least_squares" with data, "moments" without):

    - "mean": the constant term (bias) of every layer that lost inputs is moved so that its mean result is the dense
      network's. Exact for removed channels that are constant, except at the border of padded convolutions, where the
      report says so. Without `data` the means are those that stored statistics say: a batch norm's results have the
      mean and variance of its shift and scale, and from there they are carried on - through activations by the
      integral of a normal distribution, exactly; through sums, pooling and convolutions as those of independent
      channels. Layers whose lost inputs no batch norm stands before are left alone, and the report says so.
    - "moments": means from stored statistics, as above, and variances: where a batch norm stands behind a layer, its
      results are spread around their mean as they were in the dense network, lost inputs taken as independent of those
      that stay. Data are not looked at.
    - "batchnorm": batch norm statistics are estimated again on the pruned network (before folding), as cumulative
      averages over the batches.
    - "least_squares": every linear layer and convolution that lost inputs, and with `every_layer` those behind it, is
      refitted by ridge regression: inputs from the already repaired part of the pruned network, targets from the dense
      one, layer after layer (He et al., Channel Pruning, ICCV 2017; design with the residual stream's error in the
      target). `ridge`, times the mean second moment of the inputs, holds the weights to those they had.

    - "blocks", or a `BlockFit` with settings: after "least_squares" all parameters, norms included, are fitted together
      by gradient, so that the blocks of the network make what they make in the dense one (as FitNets, Romero et al.,
      ICLR 2015, and block by block BRECQ, Li et al., ICLR 2021). With y the end of a block in the pruned network, Y the
      channels that stayed of the dense one's, and var(Y) their variance around the means of channels, Adam goes down

          mean over blocks of mean (y - Y)^2 / var(Y)  +  outputs * the same of the network's outputs,

      on inputs alone, changed in every step by `BlockFit(augment=)` where it is given. Ends of blocks are the sums of
      residual streams; where a network adds nothing up, the results of its layers. Minutes for a small network on a
      CPU: a pass costs a run of the dense network and a training step of the pruned one for every sample, see
      `BlockFit`. Order and batches are the same in every run. Frozen parameters are fitted too, as by "least_squares",
      and stay frozen; tables that tokens are looked up in stay as they are.
      Memory is that of five copies of the parameters, 2 GiB of activations or those of one sample, and 2 GiB of inputs.
      A run that was stopped starts again.

    `new_bias`: whether layers without a bias, and without a batch norm behind them, may be given one. Without, the file
    and the class keep the names they have, and weights alone make up for means. By default they may, except in models
    that are built from a configuration (`config` and `from_pretrained`, as Llama's): the configuration has no place for
    a bias, and `from_pretrained` would refuse the file.

    Every repair with data is checked on inputs that are held from it, the last eighth of the samples (at most 256; of
    fewer than 64 samples half, at most 8; a single sample is fitted and checked). Loaders that shuffle are read in
    the order of the first pass every time. What counts is the error of the outputs, and what they decide: in how many
    places the largest number (of the last axis, or of axis 1 of four and more) is the one that is largest in the
    model.
    Layers whose new weights make the outputs worse are left as they were, or their means corrected alone; where there
    are such layers, all is done once more with their new weights in place, as what is right for one may show only once
    those behind it are fitted, and the better network is kept, if it is better there than without repair. With
    8 held samples and more, a gain below 5 % of the error counts only if it is twice its standard error over
    samples, as smaller ones come by chance; decisions may not be lost beyond what chance would lose; else all is
    taken back. The report names what was taken back, layers that too few rows reached (8 for each input where a
    layer lost none, else the mean is corrected alone), and rows that the two networks do not share: experts,
    regions or tokens that are picked by value.

    A repair without data is tried on a twin of the network: the same weights, with the statistics that random inputs,
    normal around the example's mean, give its batch norms; there the repair may assume of statistics what it assumes.
    What makes the twin's outputs worse is taken back, first the variances, then all. The twin knows nothing of data: it
    cannot tell whether the stored statistics are those of the data you will use. Networks whose batch norms have the
    statistics that they start with are checked as they are. Where the network fails on random inputs, or where outputs
    hold no numbers that can be compared, nothing is checked, and the report says so (`unchecked`).

    Batch norms that the plan keeps (`fold_bn=False`) are fitted as if they were folded, so the result is the same
    function: filters keep their norms, running statistics become those of `data`, scale and shift make up for it.

    Layers behind one that is left out are corrected as those that lost inputs are: what they should make is what they
    make in the whole model, so that they make up for the missing layer as far as they can.

    Memory is bounded by the moments of the layers fitted at a time (about 1 GiB); layers with more than 12,000 inputs
    per output and transposed convolutions of several groups get the "mean" correction, and the report says so.

    `progress`: as in `graphprune.plan`.

    Raises GraphPruneError for unknown methods, for data that cannot be read twice or that the model fails on, that are
    NaN or make the model's layers infinite, and for plans of another model. `model` is not touched.
    """
    if method is None:
        raise GraphPruneError("recover: expected a method, got None; leave it out for the one that suits the data")
    check_method(method, data)
    check_plan(plan, model)
    if method == "auto":
        method = "moments" if data is None else "least_squares"
    fit = (method if isinstance(method, BlockFit) else BlockFit()) if name_of(method) == "blocks" else None
    method = name_of(method)
    if new_bias is None:
        new_bias = not _configured(model)
    check_number("ridge", ridge)
    data = made_for(data, model, example_input) if method != "moments" else data
    bare, example = plain(model), ExampleInput.of(example_input)
    options = (float(ridge), every_layer, new_bias, fit)
    own = in_plain_names(plan, bare, model)
    found = _recovered(bare, own, example, data, method, *options)
    if bare is model:
        return found
    return dataclasses.replace(found, model=renewed(worn(found.model, own.removed), plan))


def _recovered(
    model: nn.Module,
    plan: Plan,
    example: ExampleInput,
    data: Any,
    method: str,
    ridge: float,
    every_layer: bool,
    new_bias: bool,
    fit: BlockFit | None,
) -> Recovery:
    stored = data is None or method == "moments"
    batches = None if stored else CalibrationData(data, example, model)
    if any(p.is_meta for p in model.parameters()):
        raise GraphPruneError("recover: the model is on the meta device and has no values; load its weights first")
    with torch.no_grad():
        if batches is None:
            if plan.layers and not plan.changes_widths:
                raise GraphPruneError(
                    "recover: what layers that are left out made is stored nowhere; pass data=, a loader or list of "
                    "batches"
                )
            made = WithoutData(model, plan, example, _common_folds(model, plan, example), new_bias).run(method)
            repaired = _closed(made.small, model, plan, made.method)
            return Recovery(repaired, made.layers, made.before, made.after, made.checked, made.unchecked)
        seen = FitData(batches, model)
        if method == "batchnorm":
            return _reestimated(model, plan, example, seen)
        small = plan.operated(model)  # with the model's own names
        folds = _common_folds(model, plan, example)
        kept = () if plan.folds else kept_folds(model, small, example)
        dense = apply_folds(model, (*folds, *kept))  # a copy, also without folds
        fitted = apply_folds(small, kept) if kept else small
        unlike = frozenset(f.layer for f in plan.folds if f not in folds)
        refit = Refit(dense, fitted, plan, example, seen, ridge, every_layer, unlike, new_bias)
        found = tuple(refit.run(solve=method != "mean"))
        if fit is not None:
            by_gradient = repair_blocks(refit, example, data, fit)
            found = (*found, by_gradient)
            method = "blocks" if by_gradient.changed else "least_squares"
        if kept and any(layer.changed for layer in found):
            take_apart(small, fitted, kept, seen)
        done = method if any(layer.changed for layer in found) else ""
        return Recovery(_closed(small, model, plan, done), found, *refit.check.errors, seen.said, _blind(refit.check))


def _blind(check: Check) -> str:
    """Why nothing could be measured, where nothing could."""
    return NO_OUTPUTS if math.isnan(check.errors[0]) else ""


def _reestimated(model: nn.Module, plan: Plan, example: ExampleInput, seen: FitData) -> Recovery:
    """With batch norm statistics estimated again, if that is no worse."""
    bare = dataclasses.replace(plan, folds=())
    small = bare.operated(model)
    check = Check(model, small, seen.held)
    check.refuse_infinite(find_readers(record_run(model, example)), seen.first_held)
    reestimate(small, seen)
    if check.passes(surely=True):
        done = _closed(apply_folds(small, plan.folds), model, plan, "batchnorm")
        return Recovery(done, (), *check.errors, seen.said, _blind(check))
    told = f"taken back: {check.told(check.now, check.last)}"
    said = LayerRecovery("all batch norms", "batchnorm", math.nan, math.nan, told, False)
    return Recovery(_closed(plan.operated(model), model, plan, ""), (said,), *check.errors, seen.said)


def _configured(model: nn.Module) -> bool:
    """Whether the model is built again from its configuration, which knows of no biases that it was given later."""
    return hasattr(model, "config") and callable(getattr(model, "from_pretrained", None))


def auto_possible(model: nn.Module, plan: Plan, data: Any) -> bool:
    """Whether "auto" can find anything to repair with, and anything that it knows how to repair."""
    if plan.empty or plan.experts or any(p.is_meta for p in model.parameters()):
        return False
    return data is not None or (bool(plan.removed) and stores_statistics(model))


def _closed(small: nn.Module, model: nn.Module, plan: Plan, repair: str) -> nn.Module:
    """What `plan.apply` makes, from a repaired `plan.operated`."""
    return remember(close_gaps(small, model, plan.layers), model, plan, repair)


def _common_folds(model: nn.Module, plan: Plan, example: ExampleInput) -> tuple[Fold, ...]:
    """The plan's folds that the model allows too: a batch norm may stand behind a layer that is left out, and behind
    a convolution only without it."""
    if not plan.layers or not plan.folds:
        return plan.folds
    known = find_folds(model, record_run(model, example))
    return tuple(fold for fold in plan.folds if fold in known)
