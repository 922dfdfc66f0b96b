"""Smaller kernels: 5x5 to 3x3 where the outer ring is worth nothing. No other layer has to change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import conv
from torch.nn.utils import parametrize

from ..dependency import DependencyGraph
from ..dependency.graph import trace
from ..errors import GraphPruneError
from ..plans.data import AttributeChange
from ..plans.plan import Plan
from ..plans.structure import structure_of
from ..plans.verification import verify as run_verification
from ..support.doors import door
from ..support.types import Ignore
from ..tracing.matching import NameTable
from ..tracing.operators import Sliding, form_of, given

_STOCK = (conv.Conv1d, conv.Conv2d, conv.Conv3d, conv.ConvTranspose1d, conv.ConvTranspose2d, conv.ConvTranspose3d)
_PADDED = "_reversed_padding_repeated_twice"  # what padding modes other than zeros read


@door("model")
def plan_kernels(
    model: nn.Module,
    example_input: Any,
    threshold: float = 0.01,
    *,
    ignore: Ignore = (),
) -> Plan:
    """Decide which convolutions get smaller kernels, without changing `model`.

    The first and last taps along one axis of a kernel go together, again and again, as long as all that goes is at most
    `threshold` (in [0, 1), default 0.01) of the kernel's energy, the sum of its squared weights; 0 takes only taps that
    are zero. Padding shrinks by one dilation step per side, so that the output keeps its size and, where the taps are
    zero, its values: a convolution whose padding is smaller keeps its kernel, as do convolutions whose weight something
    else reads or whose class computes it. The plan's `frozen` says so, for those whose taps are worth little.

    `ignore`: as in `plan`. `plan.apply`, `save`, and `graphprune.verify` (zero equivalence) are
    those of every plan.

    Raises GraphPruneError for arguments out of range, unknown names, and models that fail on the example input.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise GraphPruneError(f"threshold: expected a share of the energy in [0, 1), got {threshold!r}")
    return _decide(model, trace(model, example_input), float(threshold), ignore)


@door("model")
def shrink_kernels(
    model: nn.Module,
    example_input: Any,
    threshold: float = 0.01,
    *,
    ignore: Ignore = (),
    verify: bool = True,
) -> nn.Module:
    """A copy of `model` with smaller kernels; the same as `plan_kernels(...).apply(model)`, verified.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, padding=2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.mul_(torch.nn.functional.pad(torch.ones(3, 3), (1, 1, 1, 1)))  # the ring is zero
    >>> graphprune.shrink_kernels(net, torch.randn(1, 3, 8, 8))[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    plan = plan_kernels(model, example_input, threshold, ignore=ignore)
    small = plan.apply(model)
    if verify:
        run_verification(model, small, plan, example_input).raise_on_failure()
    return small


def _decide(
    model: nn.Module, graph: DependencyGraph, threshold: float, ignore: Ignore
) -> Plan:
    held = NameTable.of(model).all_meant(ignore, "ignore")
    removed: dict[str, dict[int, tuple[int, ...]]] = {}
    attributes: list[AttributeChange] = []
    frozen: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, conv._ConvNd) or not held.isdisjoint((path, f"{path}.weight" if path else "weight")):
            continue
        rings = _rings(module, threshold)
        if not any(rings):
            continue
        reason = _refusal(path, module, graph)
        rings = [0] * len(rings) if reason else rings
        short = [min(r, _room(module, axis)) for axis, r in enumerate(rings)]
        if reason or short != rings:
            frozen.append(f"{path}: {reason or 'its padding is smaller than the ring of taps that could go'}")
        for axis, count in enumerate(short):
            if count:
                size = module.kernel_size[axis]
                taps = (*range(count), *range(size - count, size))
                removed.setdefault(f"{path}.weight" if path else "weight", {})[axis + 2] = taps
        attributes += _changes(path, module, short)
    return Plan(
        removed=removed,
        attributes=tuple(attributes),
        frozen=tuple(frozen),
        structure=structure_of(model),
    )


def _rings(module: conv._ConvNd, threshold: float) -> list[int]:
    """How many taps go from each side of each axis: the cheapest pair first, while all of them are worth little."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_meta:
        return [0] * len(module.kernel_size)
    energy = weight.detach().double().square().sum((0, 1)).cpu().numpy()
    whole, sizes = float(energy.sum()), energy.shape
    if not math.isfinite(whole):
        raise GraphPruneError(f"{type(module).__name__}: the weight is not finite; check the network")
    rings, gone = [0] * len(sizes), 0.0
    while True:
        costs = [_pair(energy, axis) if n > 2 else math.inf for axis, n in enumerate(energy.shape)]
        axis = int(np.argmin(costs))
        gone += costs[axis]
        if not gone <= threshold * whole:
            return rings
        energy = np.delete(energy, [0, energy.shape[axis] - 1], axis)
        rings[axis] += 1


def _pair(energy: Any, axis: int) -> float:
    return float(energy.take([0, energy.shape[axis] - 1], axis).sum())


def _room(module: conv._ConvNd, axis: int) -> int:
    """How many taps per side the padding can make up for."""
    if isinstance(module.padding, str):
        return module.kernel_size[axis] if module.padding == "same" else 0
    return int(module.padding[axis]) // int(module.dilation[axis])


def _refusal(path: str, module: conv._ConvNd, graph: DependencyGraph) -> str:
    """Why a kernel stays although its taps are worth little."""
    if type(module).forward not in [kind.forward for kind in _STOCK]:
        return f"{type(module).__name__} has a forward of its own"
    if parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters:
        return "its weight is computed (a parametrisation or a hook); make it permanent first"
    name = f"{path}.weight" if path else "weight"
    if [n for n, first in graph.trace.aliases.items() if first == graph.trace.canonical(name)] != [name]:
        return "its weight is shared"
    node = graph.trace.parameters.get(graph.trace.canonical(name))
    if node is None:
        return "the example input does not reach it"
    if not all(isinstance(form := form_of(user), Sliding) and given(user, form.weight) is node for user in node.users):
        return "its weight is read by something other than the convolution"
    return ""


def _changes(path: str, module: conv._ConvNd, rings: list[int]) -> list[AttributeChange]:
    """Kernel size and padding, in all the forms in which the module keeps them."""
    out = []
    dims = len(rings)
    for axis, count in enumerate(rings):
        if not count:
            continue
        size, step = module.kernel_size[axis], count * int(module.dilation[axis])
        out.append(AttributeChange(path, "kernel_size", (axis,), size, size - 2 * count))
        if not isinstance(module.padding, str):
            old = int(module.padding[axis])
            out.append(AttributeChange(path, "padding", (axis,), old, old - step))
        padded = getattr(module, _PADDED, None)
        if isinstance(padded, (list, tuple)):
            for place in (2 * (dims - 1 - axis), 2 * (dims - 1 - axis) + 1):
                out.append(AttributeChange(path, _PADDED, (place,), int(padded[place]), int(padded[place]) - step))
    return out
