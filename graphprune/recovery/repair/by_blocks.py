"""The repair "blocks": after least squares the whole network is fitted by gradient, if that helps on held inputs."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...importance.calibration import Reader, find_readers, observe
from ...tracing.example import ExampleInput
from ...tracing.operators import Kind, kind_of
from ...tracing.trace import Trace, record_run
from . import walk
from .blocks import BlockFit, Place, chosen, find_places, fit_blocks, own_parameters, separable
from .layers import Refit
from .steps import LayerRecovery

_TITLE = "all blocks"


def repair_blocks(refit: Refit, example: ExampleInput, loader: Any, options: BlockFit) -> LayerRecovery:
    """Fit `refit.small` in place; taken back where its outputs are not surely better on held inputs, or the fit failed.

    `loader`: what the data are read from.
    """
    small, check = refit.small, refit.check
    if refit.plan.empty:
        return LayerRecovery(_TITLE, "none", math.nan, math.nan, "nothing was removed", False)
    trace = record_run(small, example)
    left = _looked_up(trace) | {name for name, form in refit.forms.items() if not form.changeable}
    places, note = _places(refit, trace)
    start = _values(small)
    done = fit_blocks(refit.dense, small, places, refit.data, loader, options, left)
    told = done.failed
    if not told and check.passes(surely=True):
        whole = f"{done.places} blocks and the outputs" if done.places else "the outputs alone"
        said = "; ".join(n for n in (f"{whole}, {options.passes} passes", note) if n)
        return LayerRecovery(_TITLE, "blocks", done.before, done.after, said)
    for tensor, value in start:
        tensor.data.copy_(value)
    told = told or check.told(check.now, check.last)
    return LayerRecovery(_TITLE, "none", math.nan, math.nan, f"blocks taken back: {told}", False)


def _places(refit: Refit, trace: Trace) -> tuple[list[Place], str]:
    """Where the networks are compared, and what is not. Rows that a network picks by value need not be those that the
    other picks."""
    known = {reader.weight for reader in refit.readers}
    readers = [r for r in find_readers(trace) if r.weight in known]
    targets = {r.weight: walk.target_of(refit.plan, r, refit.device) for r in readers if _countable(refit, r)}
    found = find_places(trace, readers, targets)
    compared = {place.weight for place in found}
    first = next(iter(refit.data.inputs()), None)
    picked: set[str] = set()
    if first is not None and found:
        some = chosen(first, range(min(first.samples, 8))) if separable(first) else first
        seen = observe(refit.dense, [r for r in readers if r.weight in compared], some, outputs=True)
        picked = {weight for weight, calls in seen.items() if any(call.rows is not None for call in calls)}
    note = f"{len(picked)} places with rows picked by value were not compared" if picked else ""
    return [place for place in found if place.weight not in picked], note


def _countable(refit: Refit, reader: Reader) -> bool:
    """Whether it is known which of the results are left."""
    return reader.weight in refit.plan.structure if reader.separable else reader.bias in refit.plan.structure


def _looked_up(trace: Trace) -> set[str]:
    """The tables that rows are looked up in: few data reach few of the rows, and the others must go with them."""
    return {
        name for name, node in trace.parameters.items() if any(kind_of(user) is Kind.LOOKUP for user in node.users)
    }


def _values(small: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(p, p.detach().clone()) for p in own_parameters(small).values()]
