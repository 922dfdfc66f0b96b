"""Plans within a latency budget: predict, prune, export, measure, correct."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ..dependency import DependencyGraph, trace
from ..errors import GraphPruneError
from ..plans import Plan, structural_hash
from .forecast import Forecast, measured_context, network_units
from .networks import Bench
from .record import Attempt, Latency
from .table import LatencyTable
from .target import Target, keep, own_table, provider_of

# A plan is good enough when it uses between this much and all of what is allowed, but for what measuring is unsure of.
_NEAR, _OVER = 0.955, 1.003
# How far the dense network's time may be from the first look at it.
_STEADY = 0.03


def plan_within(
    model: nn.Module,
    example: Any,
    target: Target,
    requested: Callable[[float], float],
    decide: Callable[[Forecast], tuple[DependencyGraph, Plan]],
) -> tuple[DependencyGraph, Plan]:
    """The plan that `decide` makes of a forecast, corrected until its measured latency is near what was asked for and
    not above it; else the nearest one that was seen, one within the budget before one that is not.

    `requested(dense)`: seconds allowed, for a dense network that takes `dense` seconds.
    """
    if target.table is not None:
        return _from_table(model, _loaded(target.table), requested, decide)
    provider = provider_of(target)
    options = target.options()
    table = own_table(provider, target.threads, options)
    with Bench(model, example, provider, target.threads, options) as bench:
        graph = trace(model, example)
        forecast = Forecast(table, measured_context(graph, table, bench.profile()))
        seen: list[tuple[DependencyGraph, Plan]] = []
        attempts: list[Attempt] = []
        for _ in range(max(1, target.attempts)):
            dense = forecast.dense
            try:
                made = decide(forecast)
            except GraphPruneError:
                if not seen:
                    raise
                break  # the correction asks for more than can go; what was seen is nearest
            limit, predicted = requested(dense) / forecast.correction, forecast.predicted * forecast.correction
            measured = None
            if target.attempts:
                now, measured = bench.compare(made[1].apply(model))
                if not seen and abs(now / dense - 1) > _STEADY:  # the first look was at a busy machine
                    again = measured_context(graph, table, bench.profile())
                    forecast = Forecast(table, dataclasses.replace(again, wall=min(again.wall, now)))
                    dense, made = forecast.dense, decide(forecast)
                    limit, predicted = requested(dense), forecast.predicted
                    now, measured = bench.compare(made[1].apply(model))
                measured *= dense / now  # what slowed both down is taken out
            seen.append(made)
            attempts.append(Attempt(1e3 * limit, 1e3 * predicted, None if measured is None else 1e3 * measured))
            if measured is None or _NEAR <= measured / requested(dense) <= _OVER or made[1].empty:
                break
            if any(a.limit_ms == attempts[-1].limit_ms for a in attempts[:-1]):
                break
            forecast.correction = measured / max(forecast.predicted, 1e-12)
    keep(table)
    chosen = _best(attempts, 1e3 * requested(dense))
    record = Latency(1e3 * requested(dense), 1e3 * dense, tuple(attempts), chosen, dict(table.about))
    graph, plan = seen[chosen]
    return graph, dataclasses.replace(plan, latency=record)


def _best(attempts: list[Attempt], limit: float) -> int:
    def rank(i: int) -> tuple[bool, float]:
        measured = attempts[i].measured_ms
        used = (attempts[i].predicted_ms if measured is None else measured) / limit
        return used > _OVER, abs(used - 1)

    return min(range(len(attempts)), key=rank)


def _loaded(table: Any) -> LatencyTable:
    return table if isinstance(table, LatencyTable) else LatencyTable.load(table)


def _from_table(
    model: nn.Module,
    table: LatencyTable,
    requested: Callable[[float], float],
    decide: Callable[[Forecast], tuple[DependencyGraph, Plan]],
) -> tuple[DependencyGraph, Plan]:
    context = table.contexts.get(structural_hash(model))
    if context is None:
        raise GraphPruneError(
            "target: the table was not made for this model; on its machine, run "
            "graphprune.latency_table(model, example_input).save(path) with it"
        )
    forecast = Forecast(table, context)
    graph, plan = decide(forecast)
    dense = context.wall
    attempt = Attempt(1e3 * requested(dense), 1e3 * forecast.predicted, None)
    record = Latency(1e3 * requested(dense), 1e3 * dense, (attempt,), 0, dict(table.about))
    return graph, dataclasses.replace(plan, latency=record)


def width_step(model: nn.Module, example: Any, target: Target) -> int:
    """The least number of channels of which every multiple is worth having on the target, for all kinds of computations
    in the model."""
    if target.table is not None:
        table = _loaded(target.table)
    else:
        provider = provider_of(target)
        table = own_table(provider, target.threads, target.options())
    found = [table.stairs_of(unit.kernel) for unit in network_units(trace(model, example))]
    if target.table is None:
        keep(table)
    return math.lcm(*(stairs.step for stairs in found))


def latency_table(model: nn.Module, example_input: Any, target: Target | None = None) -> LatencyTable:
    """The latency table of this machine for `model`: everything that planning with a latency budget looks up.

    Runs the model's computations alone at five widths each in ONNX Runtime, looks for the widths that the machine likes
    and profiles the whole dense network once. Takes a few seconds to a few minutes; times are kept in the user's cache
    directory (GRAPHPRUNE_CACHE, XDG_CACHE_HOME or ~/.cache), by machine, provider, threads and version of ONNX Runtime.

    `table.save(path)` writes a JSON file that `Target(table=path)` takes on another machine.

    Raises GraphPruneError for a model that cannot be exported and a provider that does not load.
    """
    chosen = Target.of(target)
    if chosen.table is not None:
        raise GraphPruneError("latency_table: target must not have a table already")
    provider, options = provider_of(chosen), chosen.options()
    table = own_table(provider, chosen.threads, options)
    graph = trace(model, example_input)
    with Bench(model, example_input, provider, chosen.threads, options) as bench:
        context = measured_context(graph, table, bench.profile())
    Forecast(table, context).cost(graph)
    keep(table)
    table.contexts[structural_hash(model)] = context
    return table
