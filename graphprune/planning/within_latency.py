"""Plans within a latency budget: predict, prune, export, measure, correct."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..dependency import DependencyGraph, trace
from ..errors import GraphPruneError
from ..plans.latency import Attempt, Latency
from ..plans.plan import Plan
from ..plans.structure import structural_hash
from ..runtimes.latency.forecast import Forecast, measured_context, network_units
from ..runtimes.latency.rig import Bench
from ..runtimes.latency.table import LatencyTable
from ..runtimes.latency.target import Target, brought_table, keep, own_table, rig_of
from ..support.progress import stage
from .allocation.budget import UnreachableBudget

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
        return _from_table(model, brought_table(target), requested, decide)
    with rig_of(target) as rig, rig.bench(model, example) as bench:
        table = own_table(rig)
        graph = trace(model, example)
        search = _Search(model, bench, graph, table, requested, decide)
        with stage("trying plans", target.attempts, "plans at most") as now:
            search.run(target.attempts, now.advance)
        keep(table)
    return search.result()


class _Search:
    """Plans that were tried, each nearer to the request than the one before, it is hoped."""

    def __init__(
        self,
        model: nn.Module,
        bench: Bench,
        graph: DependencyGraph,
        table: LatencyTable,
        requested: Callable[[float], float],
        decide: Callable[[Forecast], tuple[DependencyGraph, Plan]],
    ) -> None:
        self.model, self.bench, self.graph, self.table = model, bench, graph, table
        self._requested, self.decide = requested, decide
        self.forecast = Forecast(table, measured_context(graph, table, bench.profile()))
        self.seen: list[tuple[DependencyGraph, Plan]] = []
        self.attempts: list[Attempt] = []
        self.raw: list[float] = []  # predictions without corrections, in seconds

    @property
    def requested(self) -> float:
        """Seconds allowed."""
        return self._requested(self.forecast.dense)

    def run(self, count: int, tried: Callable[[], None]) -> None:
        """Try up to `count` plans; with none, one that is not measured. `tried`: called after each."""
        if not count:
            self._note(self.decide(self.forecast), None)
            return
        for _ in range(count):
            made = self._decided()
            if made is None:
                return
            measured = self._measured(made)
            if not self.seen and measured is None:  # the first look was at a busy machine
                made = self._decided()
                assert made is not None
                measured = self._measured(made, again=False)
            assert measured is not None
            same = any(made[1].removed == plan.removed for _, plan in self.seen)
            self._note(made, measured)
            tried()
            if _NEAR <= measured / self.requested <= _OVER or made[1].empty or same:
                return
            wanted = aimed(self.raw, [1e-3 * a.measured_ms for a in self.attempts if a.measured_ms], self.requested)
            self.forecast.correction = self.requested / wanted
            limit = 1e3 * self.requested / self.forecast.correction
            if any(abs(a.limit_ms / limit - 1) < 1e-9 for a in self.attempts):
                return

    def result(self) -> tuple[DependencyGraph, Plan]:
        chosen = _best(self.attempts, 1e3 * self.requested)
        dense = 1e3 * self.forecast.dense
        record = Latency(1e3 * self.requested, dense, tuple(self.attempts), chosen, dict(self.table.about))
        graph, plan = self.seen[chosen]
        return graph, dataclasses.replace(plan, latency=record)

    def _decided(self) -> tuple[DependencyGraph, Plan] | None:
        """The plan for the forecast as it is; where that expects too much of even the smallest network, the smallest
        one. None where nothing new can be tried. What the table says is no reason to refuse: the smallest network is
        measured first."""
        try:
            return self.decide(self.forecast)
        except UnreachableBudget as error:
            if error.limit is None or error.limit.stairs is None:
                raise
            return self._smallest(error)

    def _smallest(self, error: UnreachableBudget) -> tuple[DependencyGraph, Plan] | None:
        assert error.least is not None
        asked = self.forecast.correction
        self.forecast.correction = self.requested / (error.least * (1 + 1e-6))
        try:
            made = self.decide(self.forecast)
        except GraphPruneError:
            self.forecast.correction = asked
            if self.seen:
                return None  # what was seen is nearest
            raise error from None
        if self.seen:
            return made
        measured = self._measured(made, again=False)
        assert measured is not None
        if measured > self.requested * _OVER:
            raise GraphPruneError(
                f"budget: latency cannot be brought to {1e3 * self.requested:.4g} ms of {1e3 * self.forecast.dense:.4g}"
                f" ms: the smallest network allowed is expected to take {1e3 * self.forecast.predicted:.4g} ms, and "
                f"took {1e3 * measured:.4g} ms when it was measured; raise the budget or max_ratio, lower "
                f"min_channels, ignore less, or let whole layers go (granularity)"
            ) from error
        return made

    def _measured(self, made: tuple[DependencyGraph, Plan], again: bool = True) -> float | None:
        """Seconds of a plan's network, had the machine been as it was at the first look at it. With `again`, where that
        look was far off, None, and a new look is taken."""
        now, measured = self.bench.compare(made[1].apply(self.model))
        if again and not self.seen and abs(now / self.forecast.dense - 1) > _STEADY:
            context = measured_context(self.graph, self.table, self.bench.profile())
            self.forecast = Forecast(self.table, dataclasses.replace(context, wall=min(context.wall, now)))
            return None
        return measured * self.forecast.dense / now

    def _note(self, made: tuple[DependencyGraph, Plan], measured: float | None) -> None:
        forecast = self.forecast
        limit, predicted = 1e3 * self.requested / forecast.correction, 1e3 * forecast.predicted * forecast.correction
        self.seen.append(made)
        self.raw.append(forecast.predicted)
        self.attempts.append(Attempt(limit, predicted, None if measured is None else 1e3 * measured))


def aimed(predicted: Sequence[float], measured: Sequence[float], requested: float) -> float:
    """The prediction to ask for so that the measurement becomes what is requested: between the nearest measurements on
    both sides of the middle of what is near enough, on the line through them; else in proportion to the nearest one."""
    aim = requested * (_NEAR + _OVER) / 2
    pairs = [(m, p) for m, p in zip(measured, predicted, strict=True)]
    below, above = [x for x in pairs if x[0] <= aim], [x for x in pairs if x[0] > aim]
    if below and above:
        (m0, p0), (m1, p1) = max(below), min(above)
        if p0 < p1:
            return p0 + (aim - m0) * (p1 - p0) / (m1 - m0)
    m, p = min(pairs, key=lambda x: abs(x[0] / aim - 1))
    return p * aim / max(m, 1e-12)


def _best(attempts: list[Attempt], limit: float) -> int:
    def rank(i: int) -> tuple[bool, float]:
        measured = attempts[i].measured_ms
        used = (attempts[i].predicted_ms if measured is None else measured) / limit
        return used > _OVER, abs(used - 1)

    return min(range(len(attempts)), key=rank)


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
    units = network_units(trace(model, example))
    if target.table is not None:
        table = brought_table(target)
        found = [table.stairs_of(unit.kernel) for unit in units]
    else:
        with rig_of(target) as rig:
            table = own_table(rig)
            found = [table.stairs_of(unit.kernel) for unit in units]
        keep(table)
    return math.lcm(*(stairs.step for stairs in found))
