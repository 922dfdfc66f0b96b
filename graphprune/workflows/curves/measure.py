"""`sensitivity`: prune each group alone, at several ratios, and measure what the network loses."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...dependency import Group
from ...dependency.graph import trace
from ...dependency.ignored import ignored_positions
from ...dependency.reparametrised import plain
from ...dependency.sizes import SizeSolver
from ...dependency.temperature import rescales
from ...errors import GraphPruneError
from ...importance import resolve_criterion
from ...importance.calibration import batch_loss, without_loss
from ...importance.calibration.source import CalibrationSource
from ...importance.scorer import Scorer
from ...planning.allocation import allocate, chosen_groups
from ...planning.allocation.rounding import lost
from ...planning.allocation.selection import check_ratio
from ...planning.request import Criterionlike, Request
from ...planning.widths import assemble, settings_of
from ...plans.plan import Plan
from ...plans.surgery import effective_folds
from ...support.doors import door
from ...support.files import check_target, is_there
from ...support.progress import ProgressOption, reported, stage
from ...support.types import Ignore, LossFunction, PathLike
from ...support.walking import named_tensors
from ...synthesis import made_for
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.state import evaluating
from ...tracing.trace import run_model
from .curve import Curve, Sensitivity

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@door("model")
@reported("sensitivity")
def sensitivity(
    model: nn.Module,
    example_input: Any,
    data: Any = None,
    *,
    loss_fn: LossFunction | None = None,
    ratios: Sequence[float] = RATIOS,
    criterion: Criterionlike | None = None,
    ignore: Ignore = (),
    granularity: str | Sequence[str] = "auto",
    seed: int = 0,
    cache: PathLike | None = None,
    progress: ProgressOption = None,
) -> Sensitivity:
    """Error against the fraction removed, for each group of channels pruned alone; `model` is not touched.

    - `data`: inputs, or (inputs, targets) with `loss_fn`; read once and kept in memory, so a few hundred samples. By
      default the example input.
    - With `loss_fn(output, targets)`, a scalar mean over the batch, the error is the rise of the mean loss. Without, it
      is the squared difference of the outputs over their sum of squares, averaged over output tensors.
    - `ratios`: fractions of a group's units, each in (0, 1). `criterion`: in which order its units go; data go to it
      too. `ignore`, `granularity`, `seed`: as in `plan`. Groups that must stay equal to the pruned one lose units with
      it; ratios whose sizes the model's code does not allow are left out of the curve, as are groups without any.
    - `cache`: a JSON file that every finished curve is written to. What it holds is not measured again.
    - `progress`: as in `plan`.

    One copy of the model and one pass over the data per group and ratio (Li et al., Pruning Filters, ICLR 2017, with
    the groups of this package instead of single layers).

    Raises GraphPruneError for arguments out of range, for errors of the model or loss, and for a cache of another
    model, other data or other options.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> curves = graphprune.sensitivity(net, torch.randn(16, 4), ratios=[0.25, 0.5])
    >>> curves.curves[0].removed
    (2, 4)
    >>> plan = graphprune.plan(net, torch.randn(1, 4), budget=graphprune.Budget(macs=0.5), criterion=curves.criterion)
    """
    request = Request(
        0.0, ignore, "local", criterion, 1, granularity=granularity, seed=seed, data=data, loss_fn=loss_fn
    )
    if request.strategy.kinds is None:
        raise GraphPruneError(f"granularity: curves are of widths, and {granularity!r} goes as a whole")
    shares, data = _checked(ratios), made_for(data, model, example_input)
    model = plain(model)
    settings, chosen = settings_of(request), resolve_criterion(criterion)
    source = CalibrationSource.of(model, example_input, [example_input] if data is None else data, loss_fn)
    assert source is not None
    meter = _Meter(model, list(source.data), loss_fn)
    graph = trace(model, example_input)
    graph = graph.freezing(ignored_positions(request.ignore, graph, model))
    effective = effective_folds(model, graph.trace)
    folds = [fold for fold, replaceable in effective if replaceable]
    calibration = None if chosen.needs is None else source.calibration(model, folds)
    scores = Scorer(model, [fold for fold, _ in effective], chosen, seed, False, calibration, trace=graph.trace)(graph)
    kind = "error" if loss_fn is None else "loss"
    found = _Cache(cache, Sensitivity(kind, chosen.name, _fingerprint(model, meter.batches, shares, seed), ()))

    def plan_of(group: Group, removed: int) -> Plan | None:
        allocation = allocate(graph, scores, settings, {group.index: group.size - removed})
        solver = SizeSolver(graph.analysis, allocation.gone)
        resolution = solver.resolve()
        factors, blocked = rescales(graph.analysis, solver)
        if resolution.conflicts or blocked or len(allocation.removed.get(group.index, ())) != removed:
            return None
        return assemble(model, graph, allocation, resolution, factors, folds)

    curves = []
    groups = [g for g, wanted in zip(graph.groups, chosen_groups(graph, settings.kinds), strict=True) if wanted]
    with stage("curves", len(groups), "groups") as now:
        for group in groups:
            curve = found.get(group) if group.size > 1 else None
            if curve is None and group.size > 1:
                now.tell(group.name)
                curve = _measured(model, group, shares, plan_of, meter)
                found.add(curve)
            if curve is not None and curve.removed:
                curves.append(curve)
            now.advance()
    return dataclasses.replace(found.curves, curves=tuple(curves))


def _checked(ratios: Any) -> list[float]:
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, Iterable):
        raise GraphPruneError(f"ratios: expected a list of fractions in (0, 1), got {ratios!r}")
    out = sorted({check_ratio(r, "ratios") for r in ratios} - {0.0})
    if not out:
        raise GraphPruneError("ratios: expected at least one fraction above 0")
    return out


def _measured(
    model: nn.Module,
    group: Group,
    shares: Sequence[float],
    plan_of: Callable[[Group, int], Plan | None],
    meter: _Meter,
) -> Curve:
    counts = sorted({lost(r, group.size) for r in shares} - {0, group.size})
    plans = [(n, p) for n in counts if (p := plan_of(group, n)) is not None]
    errors = tuple(meter.error(p.apply(model)) for _, p in plans)
    return Curve(group.name, group.kind, group.size, tuple(n for n, _ in plans), errors)


class _Meter:
    """Measures a pruned model against the dense one on the same batches."""

    def __init__(
        self, model: nn.Module, batches: list[tuple[ExampleInput, Any]], loss_fn: LossFunction | None
    ) -> None:
        self.batches, self.loss_fn = batches, loss_fn
        self.wanted: list[list[Tensor]] = []
        if loss_fn is None:
            self.wanted = [self._answers(model, i) for i in range(len(batches))]
            if not all(self.wanted):
                raise GraphPruneError(
                    "sensitivity: the model returns no floating point tensor to compare; pass loss_fn"
                )
        self.dense = 0.0 if loss_fn is None else self._loss(model)

    def error(self, small: nn.Module) -> float:
        """The rise of the loss, or the relative squared error of the outputs."""
        if self.loss_fn is not None:
            return self._loss(small) - self.dense
        sums = np.zeros((2, len(self.wanted[0])))
        for index, wanted in enumerate(self.wanted):
            found = self._answers(small, index)
            sums[0] += [float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True)]
            sums[1] += [float(b.double().square().sum()) for b in wanted]
        return float((sums[0] / np.maximum(sums[1], 1e-300)).mean())

    def _answers(self, model: nn.Module, index: int) -> list[Tensor]:
        made = self._run(model, index)
        return [t.detach() for t in without_loss(result_tensors(made), made) if t.is_floating_point()]

    def _run(self, model: nn.Module, index: int) -> Any:
        with evaluating(model), torch.no_grad():
            return run_model(model, self.batches[index][0].clone(), "data")

    def _loss(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        for index, (example, targets) in enumerate(self.batches):
            value = float(batch_loss(self.loss_fn, self._run(model, index), example, targets, index))
            n = example.samples
            total, count = total + value * n, count + n
        if not np.isfinite(total):
            raise GraphPruneError("loss_fn: the mean loss is not a finite number")
        return total / count


class _Cache:
    """The file, if there is one; `curves` is what is known so far."""

    def __init__(self, path: PathLike | None, blank: Sensitivity) -> None:
        self.path = None if path is None else check_target(path)
        self.curves = blank
        if self.path is not None and is_there(self.path):
            held = Sensitivity.load(self.path)
            if dataclasses.replace(held, curves=()) != blank:
                raise GraphPruneError(
                    f"cache: {self.path} holds curves of other weights, data, ratios, criterion or loss; delete it or "
                    f"name another file"
                )
            self.curves = held

    def get(self, group: Group) -> Curve | None:
        known = (group.name, group.kind, group.size)
        return next((c for c in self.curves.curves if (c.name, c.kind, c.size) == known), None)

    def add(self, curve: Curve) -> None:
        self.curves = dataclasses.replace(self.curves, curves=(*self.curves.curves, curve))
        if self.path is not None:
            self.curves.save(self.path)


def _fingerprint(
    model: nn.Module, batches: Sequence[tuple[ExampleInput, Any]], shares: Sequence[float], seed: int
) -> str:
    digest = hashlib.sha256(repr((list(shares), seed)).encode())
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for inputs, targets in batches:
        for tensor in (*inputs.tensors(), *ExampleInput((targets,), {}).tensors()):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
