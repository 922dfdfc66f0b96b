"""From the recorded graph of one network to its plan: importance, allocation, sizes, rewritten modules."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import nn

from ..dependency import DependencyGraph, Frozen
from ..dependency.ignored import ignored_positions
from ..dependency.sizes import Resolution
from ..dependency.temperature import Rescale
from ..importance import resolve_criterion
from ..importance.calibration.source import CalibrationSource
from ..importance.scorer import Scorer
from ..plans.data import AttributeChange, GroupPlan
from ..plans.plan import Plan
from ..plans.rewriting import Rewrite, Rewriter
from ..plans.structure import structure_of
from ..plans.surgery import Fold, effective_folds
from ..support.progress import stage
from .allocation import Allocation, Forecasts, Limit, Settings, make_limits
from .request import Request
from .settling import settle
from .unread import Used, unread_sizes


def settings_of(request: Request, steady: bool = False) -> Settings:
    """What a request says of widths. `steady`: "auto" chooses the same groups for every ratio."""
    kinds = request.strategy.kinds
    assert kinds is not None
    return Settings(request.ratio, request.scope, kinds, request.rounding, request.budget, steady)


def plan_from_graph(
    model: nn.Module,
    graph: DependencyGraph,
    request: Request,
    *,
    source: CalibrationSource | None = None,
    steady: bool = False,
) -> tuple[DependencyGraph, Plan]:
    """`plan` for a model that is traced already, and the graph with what planning had to hold: what is ignored, and
    what turned out to be blocked."""
    found = plan_once(model, graph, request, settings_of(request, steady), source, None)
    assert found is not None
    return found


def plan_once(
    model: nn.Module,
    graph: DependencyGraph,
    request: Request,
    settings: Settings,
    source: CalibrationSource | None,
    rewriter: Rewriter | None,
    forecast: Forecasts | None = None,
) -> tuple[DependencyGraph, Plan] | None:
    """The plan on this graph, and the graph with what was held; None where the rewriter has changed its choice of
    modules, and with it the graph."""
    criterion = resolve_criterion(request.criterion)
    graph = graph.freezing(ignored_positions(request.ignore, graph, model))
    effective = effective_folds(model, graph.trace)
    folds = [fold for fold, replaceable in effective if replaceable]
    compared = settings.scope != "local" or settings.budget is not None
    normalised = (compared or settings.rounding.auto) and not criterion.comparable
    calibration = None if source is None else source.calibration(model, folds)
    known = [fold for fold, _ in effective]
    scorer = Scorer(model, known, criterion, request.seed, normalised, calibration, compared, graph.trace)
    kept_folds = folds if request.fold_bn else []

    def limits(narrowed: DependencyGraph) -> list[Limit]:
        return make_limits(settings.budget, narrowed, model, kept_folds, forecast)

    with stage("choosing widths"):
        settled = settle(graph, settings, scorer, limits, rewriter)
    if settled is None:
        return None
    graph, allocation, resolution, factors = settled
    rewrites: tuple[Rewrite, ...] | None = ()
    if rewriter is not None:
        rewrites = rewriter.rewrites(graph, allocation.gone, resolution.attributes)
    if rewrites is None:
        return None
    if forecast is not None:
        forecast.predict(graph, allocation.gone)
    found = assemble(model, graph, allocation, resolution, factors, kept_folds)
    unread = unread_sizes(model, found.removed, Used.of(graph.analysis, resolution), request.sizes or {})
    changes = (*found.attributes, *unread.changes)
    return graph, dataclasses.replace(found, rewrites=rewrites, attributes=changes, unsettled=unread.unsettled)


def assemble(
    model: nn.Module,
    graph: DependencyGraph,
    allocation: Allocation,
    resolution: Resolution,
    factors: list[Rescale],
    folds: list[Fold],
) -> Plan:
    """The plan of an allocation whose sizes are settled."""
    analysis = graph.analysis
    removed: dict[str, dict[int, tuple[int, ...]]] = {}
    layout = analysis.dims.layout()
    same: dict[bytes, tuple[int, ...]] = {}  # most tensors of a layer lose the same ones
    for (name, axis), indices in layout.by_root(layout.marked(allocation.gone[analysis.label[layout.position]])):
        key = indices.tobytes()
        if key not in same:
            same[key] = tuple(indices.tolist())
        removed.setdefault(name, {})[axis] = same[key]
    touched = [p for e in analysis.effects.values() for p in e.statistics]
    statistics = any(allocation.gone[analysis.label[p]].any() for p in touched)
    kept = [g.size - len(allocation.removed.get(g.index, ())) for g in graph.groups]
    weights = allocation.weights if allocation.weights is not None else np.ones(len(graph.groups))
    return Plan(
        removed=removed,
        attributes=tuple(
            AttributeChange(a.module, a.name, a.key, a.value, v)
            for a, v in sorted(resolution.attributes.items(), key=str)
        ),
        folds=tuple(folds),
        rescales=tuple(factors),
        groups=tuple(
            GroupPlan(g.name, g.kind, g.size, kept[g.index], allocation.asked.get(g.index), float(weights[g.index]))
            for g in graph.groups
        ),
        frozen=tuple(str(f) for f in graph.frozen if not _expected(f)),
        structure=structure_of(model),
        statistics=statistics,
        caches=graph.trace.caches,
    )


def _expected(frozen: Frozen) -> bool:
    """Kernel positions and the network's own inputs and outputs: true of every network, and no news."""
    return all(r.kind in ("kernel", "numbers", "vocabulary") for r in frozen.reasons) and bool(frozen.reasons)


__all__ = ["assemble", "plan_from_graph", "plan_once", "settings_of"]
