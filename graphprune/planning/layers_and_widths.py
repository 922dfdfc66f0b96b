"""Plans that leave layers out and narrow those that stay, within one budget: how many go, and how wide the rest is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..dependency import DependencyGraph
from ..dependency.graph import trace
from ..dependency.whole.blocks import Block
from ..errors import GraphPruneError
from ..importance.calibration import CalibrationData
from ..importance.layers import float_outputs
from ..plans.plan import Plan
from ..plans.structure import structure_of
from ..plans.surgery import bypass_layers
from ..plans.verification import failure_of, verify_layers
from ..recovery import recover
from ..runtimes.latency.forecast import Forecast
from ..runtimes.latency.shorter import ShorterForecast
from ..support.progress import stage
from ..tracing.counting import count
from ..tracing.example import ExampleInput
from ..tracing.state import evaluating
from .allocation import BUDGETS, Budget, Forecasts, UnreachableBudget, make_limits
from .layers import cheapest_first, rank_layers, refusals, working_form
from .request import Request

# (a network, the budget as counts, a forecast where latency is limited, data or None) -> the plan of its widths
Widths = Callable[[nn.Module, Budget, Forecasts | None, Any], tuple[DependencyGraph, Plan]]

# Numbers of layers tried in the first round, and samples on which trials are repaired and compared.
_FIRST, _SAMPLES = 5, 256


class JointPlanner:
    """Decides on layers, or branches, and widths within the budget, whose fractions are of `model` as it is.

    Layers are ranked once, as `granularity="layer"` does for a budget. Then for no layer, one, two and so on, until the
    budget is met without narrowing anything, the widths of what is left are planned within the budget, and that number
    is taken of which the pruned network's outputs are nearest to the model's: the sum of squared differences. Where
    there are data, candidates are planned, repaired by least squares and compared on the first 256 samples, else they
    are compared on the example input as they are. Not every number is tried where there are many: five first, then
    those around the best.
    """

    def __init__(
        self, model: nn.Module, example: ExampleInput, request: Request, branches: bool, widths: Widths
    ) -> None:
        assert request.budget is not None
        if any(p.is_meta for p in model.parameters()):
            raise GraphPruneError(
                "granularity: layers and widths together are chosen by what the network computes, and the model is on "
                "the meta device; load its weights first"
            )
        self.model, self.example, self.request, self.widths = model, example, request, widths
        self.branches = branches
        self.graph = trace(model, example)
        self.budget = _counted(request.budget, self.graph, model)
        self.scored, self.unfit = rank_layers(model, example, request, request.layer_criterion, branches)
        whole = count(model, example)
        names = [name for name in request.budget.limits() if name in ("macs", "params")] or ["macs"]
        self.order = [self.scored[i][0] for i in cheapest_first(whole, self.scored, names)]
        self.most = request.rounding.most(len(self.order))
        self.refused: dict[str, str] = {}
        self.trials = Trials(model, example, request.data)
        self.number: int | None = None  # of layers that go
        self._working: dict[int, tuple[Block, ...]] = {}

    def __call__(self, forecast: Forecast | None) -> tuple[DependencyGraph, Plan]:
        """The graph of what is left, and the plan. Only the first call chooses how many layers go."""
        if self.number is None:
            self.number, found = self._search(forecast)
            if forecast is None and self.request.data is None:
                return found
        return self._planned(self.number, forecast, self.request.data)

    def _search(self, forecast: Forecast | None) -> tuple[int, tuple[DependencyGraph, Plan]]:
        """The best number of layers, and what was planned for it."""
        errors: dict[int, float] = {}
        impossible: dict[int, UnreachableBudget] = {}
        made: dict[int, tuple[DependencyGraph, Plan]] = {}

        def look(number: int) -> None:
            if number in errors:
                return
            now.tell(f"without {number} of {last}")
            try:
                found = self._planned(number, forecast, self.trials.given)
            except UnreachableBudget as error:
                errors[number], impossible[number] = math.inf, error
                return
            errors[number] = self.trials.error(found[1])
            now.advance()
            if errors[number] == min(errors.values()):
                made.clear()  # only the best is kept
                made[number] = found

        last = self._enough(forecast)
        step = max(1, -(-last // (_FIRST - 1)))
        with stage("trying numbers of layers", unit="tried") as now:
            for number in (*range(0, last, step), last):
                look(number)
            while step > 1:
                step = -(-step // 2)
                best = min(errors, key=errors.__getitem__)
                for number in (best - step, best + step):
                    if 0 <= number <= last:
                        look(number)
        if not made:
            raise impossible[max(impossible)]
        return made.popitem()

    def _enough(self, forecast: Forecast | None) -> int:
        """The least number of layers without which the budget is met at full widths; all that may go if there is
        none."""
        low, high = 0, min(self.most, len(self._left()))
        while low < high:
            middle = (low + high) // 2
            small, _ = self._without(middle)
            graph = trace(small, self.example)
            limits = make_limits(self.budget, graph, small, (), self._shorter(forecast))
            if all(limit.cost.full <= limit.most for limit in limits):
                high = middle
            else:
                low = middle + 1
        return min(low, len(self._left()))

    def _planned(self, number: int, forecast: Forecast | None, data: Any) -> tuple[DependencyGraph, Plan]:
        small, blocks = self._without(number)
        graph, plan = self.widths(small, self.budget, self._shorter(forecast), data)
        reasons = refusals(self.scored, self.refused, self.unfit, self.branches)
        return graph, dataclasses.replace(
            plan, layers=blocks, structure=structure_of(self.model), frozen=(*reasons, *plan.frozen)
        )

    def _shorter(self, forecast: Forecast | None) -> ShorterForecast | None:
        return None if forecast is None else ShorterForecast(forecast, self.graph)

    def _left(self) -> list[Block]:
        """The layers that have not shown that they are needed, those that go first at the front."""
        return [block for block in self.order if block.module not in self.refused]

    def _without(self, number: int) -> tuple[nn.Module, tuple[Block, ...]]:
        """A copy in which the first layers of the order do nothing - all names stay - and these layers, as they run."""
        places = {block.module: i for i, (block, _) in enumerate(self.scored)}
        while True:
            if number in self._working:
                return bypass_layers(self.model, self._working[number]), self._working[number]
            chosen = sorted(self._left()[:number], key=lambda block: places[block.module])
            if self.request.output != "module":  # a graph names what is in a list
                chosen = [dataclasses.replace(block, listed=False) for block in chosen]
            blocks, culprit = working_form(self.model, self.example, chosen)
            if culprit is None:
                culprit = self._not_bypassed(blocks)
            if culprit is None:
                self._working[number] = tuple(blocks)
            else:
                self.refused[culprit[0]] = culprit[1]
                self._working.clear()

    def _not_bypassed(self, blocks: Sequence[Block]) -> tuple[str, str] | None:
        """The first layer in whose place nothing can stand while widths are planned, and why."""
        if not self._failure(blocks):
            return None
        for block in blocks:
            if reason := self._failure([block]):
                return block.module, reason
        return blocks[-1].module, self._failure(blocks)

    def _failure(self, blocks: Sequence[Block]) -> str:
        return failure_of(
            lambda: verify_layers(self.model, bypass_layers(self.model, blocks), blocks, self.example)
        )


def _counted(budget: Budget, graph: DependencyGraph, model: nn.Module) -> Budget:
    """The budget with counts in place of fractions, where these are not of times."""
    kept = {n: v for n, v in budget.limits().items() if not BUDGETS.find(n).timed}
    if not kept:
        return budget
    found = {limit.name: limit.most for limit in make_limits(Budget(**kept), graph, model, ())}
    return Budget(**(budget.limits() | found))


class Trials:
    """How near pruned networks come to `model`. `given`: the data that trials are planned on."""

    def __init__(self, model: nn.Module, example: ExampleInput, data: Any) -> None:
        self.model, self.example = model, example
        self.given: list[Any] | None = None
        self._compared = [example]
        self._fitted: list[Any] = []
        if data is not None:
            self.given = CalibrationData(data, example, model).head(_SAMPLES)
            half = -(-len(self.given) // 2)
            self._fitted = self.given[:half]
            self._compared = list(CalibrationData(self.given[half:] or self.given, example, model).inputs())
        with torch.no_grad(), evaluating(model):
            self._wanted = [float_outputs(model, one) for one in self._compared]

    def error(self, plan: Plan) -> float:
        """|a - b|² / |a|² of the model's outputs a and those of the pruned network, b; infinite where that is none."""
        small = self._pruned(plan)
        lost = size = 0.0
        with torch.no_grad(), evaluating(small):
            for example, wanted in zip(self._compared, self._wanted, strict=True):
                found = float_outputs(small, example)
                if [t.shape for t in found] != [t.shape for t in wanted]:
                    return math.inf
                lost += sum(float((a - b).square().sum()) for a, b in zip(wanted, found, strict=True))
                size += sum(float(a.square().sum()) for a in wanted)
        return lost / max(size, 1e-300) if math.isfinite(lost) else math.inf

    def _pruned(self, plan: Plan) -> nn.Module:
        if self._fitted:
            try:
                return recover(self.model, plan, self.example, self._fitted).model
            except GraphPruneError:  # these layers cannot be refitted, and nobody has asked for that
                pass
        return plan.apply(self.model)


__all__ = ["JointPlanner", "Trials"]
