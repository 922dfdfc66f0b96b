"""The oracles: permutation proves the groups, zero equivalence proves the rewrite, a run proves the module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...dependency import DependencyGraph, Group
from ...dependency.graph import trace
from ...errors import GraphPruneError
from ...support.doors import door
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.names import operator_name
from ..history import repair_after
from ..plan import Plan, check_plan
from ..rewriting import dependency_graph
from ..surgery import bypass_layers, clone_with
from .experts import verify_experts
from .layers import verify_layers
from .repaired import checks_of_repaired
from .results import TOLERANCE, Check, VerificationReport, relative_error
from .rewrite import OtherLengths, run_rewritten
from .running import run, same_shapes

TOLERANCE_64 = 1e-7


def zeroed(model: nn.Module, plan: Plan, nearly: bool = False) -> nn.Module:
    """A copy of the untouched model in which the removed slices are zero.

    `nearly`: so small that nothing else notices, but a weight divided by its own norm stays a number.
    """
    named = named_tensors(model)
    tensors = {}
    for name, axes in plan.removed.items():
        tensor = named[name].detach().clone()
        if not name.endswith("running_var"):
            for axis, indices in axes.items():
                tiny = torch.finfo(tensor.dtype).tiny ** 0.45 if nearly and tensor.is_floating_point() else 0
                tensor.index_fill_(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device), tiny)
        tensors[name] = tensor
    return clone_with(model, tensors, caches=plan.caches)


def permuted(model: nn.Module, graph: DependencyGraph, groups: Sequence[Group], seed: int = 0) -> nn.Module:
    """A copy of the model in which the units of `groups` are shuffled in all their members alike."""
    rng = np.random.default_rng(seed)
    order: dict[tuple[str, int], np.ndarray] = {}
    for group in groups:
        shuffle = rng.permutation(group.size)
        for m in group.members:
            length = graph.trace.parameters[m.parameter].meta["val"].shape[m.axis]
            current = order.get((m.parameter, m.axis), np.arange(length))
            step = np.arange(length)
            step[m.positions.reshape(-1)] = m.positions[shuffle].reshape(-1)
            order[(m.parameter, m.axis)] = current[step]
    named = named_tensors(model)
    tensors: dict[str, Tensor] = {}
    for (name, axis), index in order.items():
        source = tensors.get(name, named[name].detach())
        tensors[name] = source.index_select(axis, torch.from_numpy(index).to(source.device))
    return clone_with(model, tensors, caches=graph.trace.caches)


def permutable(graph: DependencyGraph) -> list[Group]:
    """Groups whose order means nothing: not those cut into blocks by a GroupNorm or run through in order."""
    analysis = graph.analysis
    runs_in_order = [block for constraint in analysis.equal for block in constraint.blocks]
    for node, effects in analysis.effects.items():
        name = operator_name(node)
        if name.startswith("cum") or name == "logcumsumexp":
            runs_in_order += effects.statistics
    ordered = analysis.components_of(runs_in_order)
    return [g for g in graph.groups if not ordered[graph.units(g)].any()]


def _as_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with floating point parameters and buffers in `dtype`."""
    tensors = {
        n: t.detach().to(dtype)
        for n, t in named_tensors(model).items()
        if t.is_floating_point() and t.dtype != dtype
    }
    return clone_with(model, tensors)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@door("original", "pruned", exact=True)
def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example_input: Any,
    *,
    graph: DependencyGraph | None = None,
    tolerance: float | None = None,
) -> VerificationReport:
    """Check `pruned` against `original` on the example input.

    - *forward*: the pruned network runs and its outputs have the original's shapes and are finite where those are.
    - *permutation*: shuffling the units of the groups in the original changes nothing (proves the groups).
    - *zero equivalence*: the original with the removed slices zeroed gives the pruned network's output (proves the
      rewrite). Where a norm, softmax or mean runs over removed channels its result legitimately changes; then the
      pruned network is compared with *the recorded graph* run on the cut tensors instead.

    - *rounding*, for half precision when weights were computed (folded, rescaled): each one must be what float32
      gives, rounded; the comparisons then use the values that are not rounded.

    A network that `recover` (or `prune`, by default) repaired is no longer the plan's: then these checks are of what
    the plan makes of the original, and *forward, repaired* and *repaired* say that `pruned` runs and differs from it
    only in what the repair may change (constant terms for "mean", any values otherwise).

    A plan that leaves out layers or experts is checked against the original in which they are bypassed, or barred from
    being chosen, instead. One that leaves out layers and changes widths too is checked in two steps: the original with
    these layers replaced by modules that do nothing against the original in which hooks bypass them (*bypass*,
    *weights*), then `pruned` against the former, as above. `graph`: of the former.

    Relative errors above `tolerance` (default 1e-4; half precision models are compared in float32) are measured again
    in float64. Layers, where nothing is computed anew, are held to 1e-5 by default, and not measured again. Costs four
    forward passes and two copies of the model. On the meta device only shapes are checked.

    Raises GraphPruneError where there is not enough memory for that.
    """
    check_plan(plan, original)
    example = ExampleInput.of(example_input)
    try:
        repair = repair_after(pruned, plan)
        if not repair:
            return _verified(original, pruned, plan, example, graph, tolerance)
        cut = plan.apply(original)
        found = _verified(original, cut, plan, example, graph, tolerance)
        return VerificationReport((*checks_of_repaired(pruned, cut, repair, example), *found.checks))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        size = sum(t.numel() * t.element_size() for t in named_tensors(original).values()) / 2**30
        raise GraphPruneError(
            f"verify: not enough memory to compare the networks (the original has {size:.1f} GiB of weights, and two "
            f"copies of it are made): pass a smaller example_input, or verify=False and check on a larger machine"
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(t in str(error) for t in ("allocate memory", "out of memory", "bad_alloc"))


def _verified(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example: ExampleInput,
    graph: DependencyGraph | None,
    tolerance: float | None,
) -> VerificationReport:
    limit = {} if tolerance is None else {"tolerance": tolerance}
    whole = original  # the model that the plan is for
    first: list[Check] = []
    if plan.layers:

        if not plan.changes_widths:
            return verify_layers(original, pruned, plan.layers, example, **limit)
        original = bypass_layers(whole, plan.layers)
        found = verify_layers(whole, original, plan.layers, example, **limit)
        first = [c for c in found.checks if c.name != "forward"]
    if plan.experts:

        return verify_experts(original, pruned, plan.experts, example, **limit)
    tolerance = TOLERANCE if tolerance is None else tolerance
    if graph is None and plan.rewrites:
        graph = dependency_graph(original, example, plan.output, [r.module for r in plan.rewrites])
    graph = graph or trace(original, example)
    if graph.trace.unready:
        raise GraphPruneError(graph.trace.unready)
    outputs = run(original, example, "verify (original)"), run(pruned, example, "verify (pruned)")
    checks = [same_shapes(outputs[1], outputs[0]), *first]
    if any(p.is_meta for p in original.parameters()):
        return VerificationReport(tuple(checks))
    dtype = _dtype_of(original)
    half = dtype in (torch.float16, torch.bfloat16)
    rounded = bool(plan.folds or plan.rescales)  # weights were computed, and rounded to the model's own dtype
    if half and rounded:
        check, pruned = _unrounded(whole, pruned, plan)
        checks.append(check)
    if half:
        compared = _compare_in(torch.float32, original, pruned, plan, example, graph, tolerance)
    else:
        compared = _compare(original, outputs, plan, example, graph, tolerance)
    failed = [c for c in compared if not c.passed]
    if failed and dtype != torch.float64:
        try:
            strict = tolerance if rounded else max(TOLERANCE_64, tolerance * 1e-3)
            compared = _compare_in(torch.float64, original, pruned, plan, example, graph, strict)
        except GraphPruneError as error:
            if half:
                raise
            compared = [dataclasses.replace(c, detail=f"{c.detail} (float64: {error})") for c in compared]
    return VerificationReport((*checks, *compared))


def _unrounded(original: nn.Module, pruned: nn.Module, plan: Plan) -> tuple[Check, nn.Module]:
    """Half precision is too coarse to compare outputs when weights were computed. So every tensor must be what the plan
    gives in float32, rounded (twice at most: folded and rescaled); and the oracles judge the pruned module with the
    tensors that are not rounded."""
    exact = named_tensors(plan.apply(_as_dtype(original, torch.float32)))
    found = named_tensors(pruned)
    worst = 0.0
    for name in exact.keys() | found.keys():
        if name not in exact or name not in found or exact[name].shape != found[name].shape:
            return Check("rounding", False, math.nan, f"{name} is not what the plan leaves"), pruned
        want, got = exact[name].detach(), found[name].detach()
        if not got.is_floating_point():
            continue
        limits = torch.finfo(got.dtype)
        excess = (got.to(want.dtype) - want).abs() - 2 * limits.eps * (want.abs() + limits.tiny)
        if not bool((excess <= 0).all()):
            return Check("rounding", False, relative_error(got, want), f"{name} is not what the plan computes"), pruned
        worst = max(worst, relative_error(got, want))
    return Check("rounding", True, worst), clone_with(pruned, {n: t.detach() for n, t in exact.items()})


def _compare_in(
    dtype: torch.dtype,
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example: ExampleInput,
    graph: DependencyGraph,
    tolerance: float,
) -> list[Check]:
    """`_compare` on copies in another floating point type."""
    original, pruned = _as_dtype(original, dtype), _as_dtype(pruned, dtype)
    example = example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    outputs = run(original, example, "verify (original)"), run(pruned, example, "verify (pruned)")
    return _compare(original, outputs, plan, example, graph, tolerance)


def _compare(
    original: nn.Module,
    outputs: tuple[Any, Any],
    plan: Plan,
    example: ExampleInput,
    graph: DependencyGraph,
    tolerance: float,
) -> list[Check]:
    """The two oracles; `outputs` are those of the original and of the pruned network on `example`."""
    dense, small = outputs
    out = [_permutation_check(original, dense, graph, example, tolerance)]
    made = _rewritten_check if plan.statistics else _zero_check
    out.append(made(original, small, plan, example, graph, tolerance))
    return out


def _zero_check(
    original: nn.Module, small: Any, plan: Plan, example: ExampleInput, graph: DependencyGraph, tolerance: float
) -> Check:
    error = relative_error(small, run(zeroed(original, plan), example, "verify (zeroed)"))
    if math.isinf(error):
        error = relative_error(small, run(zeroed(original, plan, nearly=True), example, "verify (zeroed)"))
    return Check("zero equivalence", error <= tolerance, error)


def _rewritten_check(
    original: nn.Module, small: Any, plan: Plan, example: ExampleInput, graph: DependencyGraph, tolerance: float
) -> Check:
    """Where lengths follow from values (nodes of a graph picked by scores), the recorded calls may not fit together any
    more. Then zeros have to prove it, which they can where what runs over the channels is a sum."""
    try:
        error = relative_error(small, run_rewritten(graph, plan, example, original))
    except OtherLengths as wrong:
        found = _zero_check(original, small, plan, example, graph, tolerance)
        reason = str(wrong).strip().splitlines()[:1]
        told = f"the recorded calls cannot be run on the cut tensors ({''.join(reason)}): lengths depend on values"
        return dataclasses.replace(found, detail=told)
    return Check("rewritten graph", error <= tolerance, error)


def _permutation_check(
    original: nn.Module, want: Any, graph: DependencyGraph, example: ExampleInput, tolerance: float
) -> Check:
    groups = permutable(graph)
    if not groups:
        return Check("permutation", True, math.nan, "no groups")
    error = relative_error(run(permuted(original, graph, groups), example, "verify (permuted)"), want)
    detail = f"{len(groups)} groups"
    if error > tolerance:
        for group in groups:
            if relative_error(run(permuted(original, graph, [group]), example, "verify (permuted)"), want) > tolerance:
                detail = f"the units of {group.name} are not interchangeable"
                break
    return Check("permutation", error <= tolerance, error, detail)
