"""The pruned network beside the one that the plan makes anew: every tensor and every attribute, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...support.comparing import Comparison, Difference, compared
from ...support.interrupts import from_signal
from ...support.walking import all_modules, named_tensors
from ...tracing.example import ExampleInput
from ...tracing.state import RandomState
from ...tracing.trace import run_model
from ..history import KEY
from ..surgery import clone_with
from .results import Check

Allowed = Callable[[Difference], bool]
_SHOWN = 3


def checked_state(
    pruned: nn.Module, cut: nn.Module, example: ExampleInput, allowed: Allowed | None = None, trained: bool = False
) -> tuple[Check, bool]:
    """Whether `pruned` holds what `cut` holds, which the plan has just made of the original.

    What running the network changes by itself (counters, caches, observers of quantisation) is set aside. `allowed`:
    differences that may be. Flags of training and of gradients must agree, unless they were switched for all of it
    together. `trained`: they need not, and what a run in training mode changes is set aside too. The second result:
    whether something was set aside that runs may read.
    """
    comparison = compared(pruned, cut, (KEY,))
    found = [d for d in comparison.found if allowed is None or not allowed(d)]
    if not trained:
        found += _modes(comparison)
    count = len(found)
    if any(not (d.values and isinstance(_held(d), nn.Parameter)) for d in found):  # runs leave parameters alone
        moved = _moved(cut, example, True) + _moved(pruned, example, True)
        trains = _moved(cut, example, False) + _moved(pruned, example, False)
        counted = [d for d in trains if trained or d.number]
        found = [d for d in found if not any(_within(d.where, m.where) for m in (*moved, *counted))]
    if not found:
        counts = f"{comparison.tensors} tensors and {comparison.attributes} attributes"
        return Check("state", True, math.nan, f"{counts} as the plan leaves them"), count > 0
    return Check("state", False, math.nan, _told(found)), len(found) < count


def _told(found: list[Difference]) -> str:
    told = "; ".join(map(str, found[:_SHOWN]))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    trained = ""
    if sum(d.values for d in found) > 1:
        trained = " (of a network that was trained since, trained=True compares the structure)"
    return f"{told}{more}{trained}"


def _held(difference: Difference) -> object:
    name = difference.where.rpartition(".")[2]
    return None if difference.owner is None else difference.owner._parameters.get(name)


def _within(place: str, other: str) -> bool:
    return place == other or (place.startswith(other) and place[len(other)] in ".[,")


def _modes(comparison: Comparison) -> list[Difference]:
    """Flags that were not switched for the whole network, as `eval()`, `train()` and `requires_grad_()` do."""
    out = []
    for flags, name in ((comparison.training, "training"), (comparison.gradients, "requires_grad")):
        here, there = ({pair[side] for pair in flags.values()} for side in (0, 1))
        if here == {False} or (len(here) == 1 and len(there) == 1):
            continue
        for where, (a, b) in flags.items():
            if a != b:
                out.append(Difference(f"{where}.{name}".lstrip("."), f"{a} instead of {b}"))
    return out


def _moved(model: nn.Module, example: ExampleInput, evaluating: bool) -> list[Difference]:
    """What one run changes in a copy of `model`."""
    run, before = clone_with(model, {}), clone_with(model, {})
    state, held = RandomState(named_tensors(run).values()), _written(run)
    try:
        for module in all_modules(run).values():
            module.training = not evaluating
        with torch.no_grad():
            run_model(run, example.clone(), "verify (what a run changes)")
    except Exception as error:  # what it changed until then counts; whether it runs is judged elsewhere
        if from_signal(error):
            raise
    finally:
        state.put_back(drawn=True)
    again = _written(run)
    same = {name for name in held.keys() & again.keys() if held[name] == again[name]}
    written = [Difference(name, "is written") for name in held if name not in same]
    return [*compared(run, before, (KEY,)).found, *written]


def _written(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By name the buffers, and tensors in plain attributes: which they are, and how often they were written to. A peak
    that was seen before is seen again, and the values are the same."""
    out = {}
    for path, module in all_modules(model).items():
        for name, value in (*module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, Tensor) and not value.is_inference():
                out[f"{path}.{name}".lstrip(".")] = id(value), value._version
    return out
