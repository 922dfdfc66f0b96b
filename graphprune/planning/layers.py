"""Plans that leave whole layers out: find them, rank them, choose, and try before promising."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..dependency.whole.blocks import Block, find_blocks
from ..dependency.whole.branches import search_branches
from ..errors import GraphPruneError
from ..importance.calibration import CalibrationData
from ..importance.layers import check_layer_criterion, layer_scores
from ..plans.plan import Plan
from ..plans.structure import structure_of
from ..plans.surgery import remove_layers, uncounted_tokens
from ..plans.verification import failure_of, verify_layers
from ..support.progress import stage
from ..support.types import Ignore
from ..tracing.counting import Count, count
from ..tracing.example import ExampleInput
from ..tracing.matching import NameTable, items_of, modules_around
from .allocation import Budget
from .allocation.rounding import lost
from .request import Request

_COUNTED = ("macs", "params")


def plan_layers(model: nn.Module, example_input: Any, request: Request, branches: bool, gone: int = 0) -> Plan:
    """The plan that leaves out a share of the layers that can go, rounded to nearest, or as many as a budget demands.

    `branches`: of the residual branches inside layers. `gone`: how many went before, of which the ratio is too.

    `criterion`: see `graphprune.importance.layers.layer_scores`; without `data` layers are ranked on the example input.
    What is chosen is tried: a layer whose list cannot be shortened (the code counts on its length) becomes a bypass,
    and one that cannot be bypassed either stays, with the reason in `frozen`.
    """
    example = ExampleInput.of(example_input)
    scored, unfit = rank_layers(model, example, request, request.criterion, branches)
    refused: dict[str, str] = {}
    while True:
        left = [(b, s) for b, s in scored if b.module not in refused]
        chosen = _chosen(model, example, left, request, gone)
        with stage("trying"):
            tried, culprit = working_form(model, example, chosen)
        if culprit is None:
            return Plan(
                removed={},
                layers=tuple(tried),
                frozen=refusals(scored, refused, unfit, branches),
                structure=structure_of(model),
            )
        refused[culprit[0]] = culprit[1]


def rank_layers(
    model: nn.Module, example: ExampleInput, request: Request, criterion: Any, branches: bool
) -> tuple[list[tuple[Block, float]], tuple[str, ...]]:
    """The layers (or branches) that can go, in the order in which they run, with their scores - lowest go first - and
    what has no such form, with the reasons."""
    data, loss_fn = request.data, request.loss_fn
    ranked = check_layer_criterion(criterion, data, branches)
    held = held_modules(request.ignore, model)
    found, unfit = search_branches(model, example) if branches else (find_blocks(model, example), ())
    blocks = tuple(b for b in found if held.isdisjoint(b.modules))
    batches = [(example, None)] if data is None else CalibrationData(data, example, model)
    with stage("ranking layers"):
        scores = layer_scores(model, blocks, ranked, batches, loss_fn, example) if blocks else []
    for block, score in zip(blocks, scores, strict=True):
        if math.isnan(score):
            raise GraphPruneError(f"{ranked}: the score of {block.module} is NaN; check its weights and the data")
    return list(zip(blocks, scores, strict=True)), tuple(unfit)


_NONE = {
    False: "no layer can be left out: none is called once, reads one stream, returns a tensor of its shape, and is no "
    "branch of a residual connection",
    True: "no branch can be left out: there is no module, called once, whose result is only added to what it was "
    "computed from",
}


def refusals(
    scored: Sequence[Any], refused: Mapping[str, str], unfit: Sequence[str], branches: bool
) -> tuple[str, ...]:
    """What cannot be left out, and why, one line each; or that there is nothing that can."""
    reasons = [f"{module} cannot be left out: {reason}" for module, reason in refused.items()]
    return (*reasons, *unfit, *(() if scored else (_NONE[branches],)))


def held_modules(ignore: Ignore, model: nn.Module) -> set[str]:
    """The paths of modules that are ignored, lie in an ignored one, or hold something ignored, and the names of what is
    ignored in them. Raises GraphPruneError for what matches nothing."""
    held = NameTable.of(model).all_meant(ignore, "ignore")
    return held.union(modules_around(held))


def ignored_names(ignore: Ignore, model: nn.Module) -> list[str]:
    """What is ignored as names and patterns, for copies of the model."""
    items = items_of(ignore, "ignore")
    return NameTable.of(model).texts(items, "ignore") if items else []


def _chosen(
    model: nn.Module,
    example: ExampleInput,
    scored: Sequence[tuple[Block, float]],
    request: Request,
    before: int,
) -> list[Block]:
    """The least important layers, in the order in which they run. `before`: how many went already."""
    rounding, all_of_them = request.rounding, len(scored) + before
    most = rounding.most(all_of_them) - before
    if request.budget is not None:
        gone = _within(model, example, scored, request.budget, most)
    else:
        number = max(0, min(lost(request.one_ratio("layers"), all_of_them) - before, most))
        order = sorted(range(len(scored)), key=lambda i: scored[i][1])
        gone = set(order[:number])
    return [block for i, (block, _) in enumerate(scored) if i in gone]


def check_alone(request: Request) -> None:
    """Raise GraphPruneError for ratios and budgets that layers alone do not take."""
    if request.budget is None:
        request.one_ratio("layers")
        return
    for name in request.budget.limits():
        if name not in _COUNTED:
            raise GraphPruneError(
                f"budget: {name} is not known for layers alone; use Budget(macs=...) or Budget(params=...), or let "
                f'widths change too, as in granularity=["layer", "channels"]'
            )


def _within(
    model: nn.Module, example: ExampleInput, scored: Sequence[tuple[Block, float]], budget: Budget, most: int
) -> set[int]:
    """Which layers go to meet the budget: least importance per cost saved first; then what still fits returns."""
    whole = count(model, example)
    totals = {"macs": whole.macs, "params": whole.parameters}
    limits = budget.limits()
    most_cost = {n: float(v) * totals[n] if v <= 1 else float(v) for n, v in limits.items()}
    saved = [_saved(whole, block) for block, _ in scored]
    cost = {n: float(totals[n]) for n in limits}
    gone: list[int] = []
    for i in cheapest_first(whole, scored, list(limits)):
        if all(cost[n] <= most_cost[n] for n in limits) or len(gone) == most:
            break
        gone.append(i)
        cost = {n: cost[n] - saved[i][n] for n in limits}
    for n in limits:
        if cost[n] > most_cost[n]:
            raise GraphPruneError(
                f"budget: {n} cannot be brought to {most_cost[n]:,.0f} by leaving out layers: {cost[n]:,.0f} remain "
                f"without the {len(gone)} that can go; raise the budget, or prune channels too"
            )
    for i in sorted(gone, key=lambda i: scored[i][1], reverse=True):
        if all(cost[n] + saved[i][n] <= most_cost[n] for n in limits):
            gone.remove(i)
            cost = {n: cost[n] + saved[i][n] for n in limits}
    return set(gone)


def cheapest_first(whole: Count, scored: Sequence[tuple[Block, float]], names: Sequence[str]) -> list[int]:
    """The order in which layers go for a budget: least importance per share saved of these costs first.

    `names`: of "macs" and "params". `whole`: the count of the network with all its layers.
    """
    totals = {"macs": whole.macs, "params": whole.parameters}
    saved = [_saved(whole, block) for block, _ in scored]
    share = [sum(s[n] / max(totals[n], 1) for n in names) for s in saved]
    return sorted(range(len(scored)), key=lambda i: scored[i][1] / max(share[i], 1e-12))


def _saved(whole: Count, block: Block) -> dict[str, int]:
    inside = [c for path, c in whole.per_layer.items() if block.holds(path)]
    return {"macs": sum(c.macs for c in inside), "params": sum(c.parameters for c in inside)}


def working_form(
    model: nn.Module, example: ExampleInput, chosen: Sequence[Block]
) -> tuple[list[Block], tuple[str, str] | None]:
    """The layers in a form that works: deleted, else bypassed. Or the first that works in neither, and why."""
    if not chosen or not _failure(model, example, chosen):
        return list(chosen), None
    out: list[Block] = []
    for block in chosen:
        reason = _failure(model, example, [*out, block])
        if reason and block.listed:
            block = dataclasses.replace(block, listed=False)
            reason = _failure(model, example, [*out, block])
        if reason:
            return [], (block.module, reason)
        out.append(block)
    return out, None


def _failure(model: nn.Module, example: ExampleInput, blocks: Sequence[Block]) -> str:
    """Why the model without these layers is not what it should be; empty when it is."""
    wrong = failure_of(lambda: verify_layers(model, remove_layers(model, blocks), blocks, example))
    return wrong or uncounted_tokens(model, blocks)


__all__ = [
    "cheapest_first",
    "check_alone",
    "held_modules",
    "ignored_names",
    "plan_layers",
    "rank_layers",
    "refusals",
    "working_form",
]
