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
from ...dependency.reparametrised import forms_in, plain
from ...errors import GraphPruneError
from ...support.doors import door
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.names import operator_name
from ..history import repair_after
from ..naming import in_plain_names
from ..plan import Plan, check_plan
from ..rewriting import dependency_graph
from ..surgery import bypass_layers, clone_with
from .experts import verify_experts
from .layers import verify_layers
from .precision import HALF, in_precision, precision_of
from .repaired import TRAINED, checks_of_repaired
from .results import TOLERANCE, TOLERANCES, Check, VerificationReport, out_of_memory, relative_error
from .rewrite import OtherLengths, run_rewritten
from .running import does_not_run, run, same_shapes
from .state import checked_state

TOLERANCE_64 = 1e-7


def zeroed(model: nn.Module, plan: Plan, nearly: bool = False) -> nn.Module:
    """A copy of the untouched model in which the removed slices are zero.

    `nearly`: so small that nothing else notices, but a weight divided by its own norm stays a number.
    """
    named, forms = named_tensors(model), forms_in(model)
    tensors = {}
    for name, axes in plan.removed.items():
        tensor = named[name].detach().clone()
        if not name.endswith("running_var"):
            for axis, indices in axes.items():
                tiny = torch.finfo(tensor.dtype).tiny ** 0.45 if nearly and tensor.is_floating_point() else 0
                tensor.index_fill_(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device), tiny)
        if name in forms:
            tensor = forms[name].settled(tensor)
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


@door("original", "pruned", exact=True)
def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example_input: Any,
    *,
    graph: DependencyGraph | None = None,
    tolerance: float | None = None,
    trained: bool = False,
) -> VerificationReport:
    """Check `pruned` against `original` on the example input.

    - *forward*: the pruned network runs and its outputs have the original's shapes and are finite where those are.
    - *permutation*: shuffling the units of the groups in the original changes nothing (proves the groups).
    - *zero equivalence*: the original with the removed slices zeroed gives the pruned network's output (proves the
      rewrite). Where a norm, softmax or mean runs over removed channels its result legitimately changes; then the
      pruned network is compared with *the recorded graph* run on the cut tensors instead.
    - *rounding*, for half precision when weights were computed (folded, rescaled): each one must be what float32
      gives, rounded; the comparisons then use the values that are not rounded.
    - *state*: `pruned` holds, bit by bit, what `plan.apply(original)` does: parameters, buffers, tensors in plain
      attributes, and every number, text, function and object that attributes lead to (sizes, scales, eps, momentum,
      flags of single modules), shared where they are shared there. Aside are hooks, gradients, what one run changes by
      itself (counters, caches, observers of quantisation), and `train()`, `eval()` and `requires_grad_()` of the whole.

    A network that `recover` (or `prune`, by default) repaired is no longer the plan's: then these checks are of what
    the plan makes of the original, and *forward, repaired* and *repaired* say that `pruned` runs and differs from it
    only in the values that the repair may change: constant terms and means for "mean"; statistics of batch norms, and
    layers into which these are folded, for "batchnorm"; both for "moments"; weights and constant terms of all layers
    that multiply, and batch norms, for "least_squares"; all parameters for "blocks". `trained=True`: `pruned` was
    trained since; *forward, trained* and *trained* say that it runs and differs in the values of tensors and in modes
    alone.

    A plan that leaves out layers or experts is checked against the original in which they are bypassed, or barred from
    being chosen, instead. One that leaves out layers and changes widths too is checked in two steps: the original with
    these layers replaced by modules that do nothing against the original in which hooks bypass them (*bypass*,
    *weights*), then `pruned` against the former, as above. `graph`: of the former.

    `tolerance`: the largest relative error of outputs; by default what rounding explains, 1e-4 in float32 and 1e-9 in
    float64. Models with parameters in half precision are compared in float32. Larger errors are measured again in
    float64, where 1e-7 is the limit (that of the model's precision if weights were computed); `.half()`, `.float()` and
    other types that the code names are then all float32, or float64. Code that only runs in half precision is compared
    as coarsely as that, and the report says so. Layers, where nothing is computed anew, are held to 1e-5 by default,
    and not measured again. Costs four forward passes and two copies of the model. On the meta device shapes and
    attributes are checked.

    Raises GraphPruneError where there is not enough memory for that, and where the original does not run.
    """
    check_plan(plan, original)
    example = ExampleInput.of(example_input)
    try:
        cut, repair = plan.apply(original), repair_after(pruned, plan)
        bare = plain(original)
        named = in_plain_names(plan, bare, original)
        if trained or repair:
            cut = plain(cut)
            checks = checks_of_repaired(plain(pruned), cut, named, TRAINED if trained else repair, example)
            return VerificationReport((*checks, *_verified(bare, cut, named, example, graph, tolerance).checks))
        state, ran = checked_state(pruned, cut, example)
        # what differs because it ran alone starts where the original stands
        compared = cut if ran and state.passed else pruned
        del cut  # before the copies of the oracles
        try:
            if compared is not pruned:
                run(pruned, example, "verify (pruned)")
            found = _verified(bare, plain(compared), named, example, graph, tolerance)
        except GraphPruneError as error:
            if state.passed:
                raise
            return VerificationReport((does_not_run("forward", error), state))
        return VerificationReport((*found.checks, state))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        size = sum(t.numel() * t.element_size() for t in named_tensors(original).values()) / 2**30
        raise GraphPruneError(
            f"verify: not enough memory to compare the networks (the original has {size:.1f} GiB of weights, and two "
            f"copies of it are made): pass a smaller example_input, or verify=False and check on a larger machine"
        ) from error


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
    if graph is None and plan.rewrites:
        graph = dependency_graph(original, example, plan.output, [r.module for r in plan.rewrites])
    graph = graph or trace(original, example)
    if graph.trace.unready:
        raise GraphPruneError(graph.trace.unready)
    outputs = run(original, example, "verify (original)"), run(pruned, example, "verify (pruned)")
    checks = [same_shapes(outputs[1], outputs[0]), *first]
    if any(p.is_meta for p in original.parameters()):
        return VerificationReport(tuple(checks))
    half = precision_of(original.parameters()) in HALF
    if half and _computes(plan, original):  # weights were computed, and rounded to the model's own precision
        check, pruned = _unrounded(whole, pruned, plan)
        checks.append(check)
    oracles = _Oracles(original, pruned, plan, example, graph, tolerance)
    compared = oracles.of_half(outputs) if half else oracles.of_full(outputs)
    return VerificationReport((*checks, *compared))


def _computes(plan: Plan, original: nn.Module) -> bool:
    """Surgery computes weights, and rounds them; all others it takes as they are."""
    return bool(plan.folds or plan.rescales or forms_in(original))


def _unrounded(original: nn.Module, pruned: nn.Module, plan: Plan) -> tuple[Check, nn.Module]:
    """Half precision is too coarse to compare outputs when weights were computed. So every tensor must be what the plan
    gives in float32, rounded (twice at most: folded and rescaled); and the oracles judge the pruned module with the
    tensors that are not rounded."""
    exact = named_tensors(plan.apply(in_precision(original, torch.float32)))
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
        same = got.to(want.dtype) == want  # infinite in a mask
        if not bool((same | (excess <= 0) | (got.isnan() & want.isnan())).all()):
            return Check("rounding", False, relative_error(got, want), f"{name} is not what the plan computes"), pruned
        worst = max(worst, relative_error(got, want))
    return Check("rounding", True, worst), clone_with(pruned, {n: t.detach() for n, t in exact.items()})


@dataclasses.dataclass(frozen=True)
class _Oracles:
    """The two comparisons of outputs, in one precision or another."""

    original: nn.Module
    pruned: nn.Module
    plan: Plan
    example: ExampleInput
    graph: DependencyGraph
    asked: float | None  # the tolerance

    def of_full(self, outputs: tuple[Any, Any]) -> list[Check]:
        """In the model's own precision, and where that is too coarse, all in float64."""
        dtype = precision_of(self.original.parameters())
        found = self._compare(self.original, outputs, self.limit(dtype))
        if all(c.passed for c in found):
            return found
        try:
            return self._in(torch.float64, self.strict(dtype))
        except GraphPruneError as error:
            return [dataclasses.replace(c, detail=f"{c.detail} (float64: {error})".strip()) for c in found]

    def of_half(self, outputs: tuple[Any, Any]) -> list[Check]:
        """All in float32, then float64; code that can only run in its own precision is compared as coarsely as that."""
        dtype = precision_of(self.original.parameters())
        try:
            found = self._in(torch.float32, self.limit(torch.float32))
            return found if all(c.passed for c in found) else self._in(torch.float64, self.strict(torch.float32))
        except GraphPruneError as error:
            found = self._compare(self.original, outputs, self.limit(dtype))
            return [dataclasses.replace(c, detail=f"{c.detail} ({dtype} only: {error})".strip()) for c in found]

    def limit(self, dtype: torch.dtype) -> float:
        """The largest relative error that is taken for rounding."""
        return TOLERANCES.get(dtype, TOLERANCE) if self.asked is None else self.asked

    def strict(self, dtype: torch.dtype) -> float:
        """That limit in float64, of a model in `dtype`: what was computed by surgery is rounded to that."""
        if _computes(self.plan, self.original):
            return self.limit(dtype)
        return min(TOLERANCE_64, self.limit(dtype)) if self.asked is None else max(TOLERANCE_64, self.asked * 1e-3)

    def _in(self, dtype: torch.dtype, tolerance: float) -> list[Check]:
        """On copies in `dtype`, in which everything is computed."""
        original, pruned = in_precision(self.original, dtype), in_precision(self.pruned, dtype)
        example = self.example.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        moved = dataclasses.replace(self, original=original, pruned=pruned, example=example)
        outputs = run(original, example, "verify (original)", dtype), run(pruned, example, "verify (pruned)", dtype)
        return moved._compare(original, outputs, tolerance, dtype)

    def _compare(
        self, original: nn.Module, outputs: tuple[Any, Any], tolerance: float, dtype: torch.dtype | None = None
    ) -> list[Check]:
        """`outputs` are those of the original and of the pruned network on the example."""
        dense, small = outputs
        out = [_permutation_check(original, dense, self.graph, self.example, tolerance, dtype)]
        made = self._from_calls if self.plan.statistics else self._from_zeros
        out.append(made(original, small, tolerance, dtype))
        return out

    def _from_calls(self, original: nn.Module, small: Any, tolerance: float, dtype: torch.dtype | None) -> Check:
        """Where lengths follow from values (nodes of a graph picked by scores), the recorded calls may not fit together
        any more. Then zeros have to prove it, which they can where what runs over the channels is a sum."""
        try:
            error = relative_error(small, run_rewritten(self.graph, self.plan, self.example, original, dtype))
        except OtherLengths as wrong:
            found = self._from_zeros(original, small, tolerance, dtype)
            return dataclasses.replace(found, detail=f"{wrong.args[0]}: lengths depend on values")
        return Check("rewritten graph", error <= tolerance, error)

    def _from_zeros(self, original: nn.Module, small: Any, tolerance: float, dtype: torch.dtype | None) -> Check:
        error = self._from_zeroed(original, small, False, dtype)
        if math.isinf(error):
            error = self._from_zeroed(original, small, True, dtype)
        return Check("zero equivalence", error <= tolerance, error)

    def _from_zeroed(self, original: nn.Module, small: Any, nearly: bool, dtype: torch.dtype | None) -> float:
        reference = zeroed(original, self.plan, nearly=nearly)
        return relative_error(small, run(reference, self.example, "verify (zeroed)", dtype))


def _permutation_check(
    original: nn.Module,
    want: Any,
    graph: DependencyGraph,
    example: ExampleInput,
    tolerance: float,
    dtype: torch.dtype | None,
) -> Check:
    def error_of(groups: Sequence[Group]) -> float:
        return relative_error(run(permuted(original, graph, groups), example, "verify (permuted)", dtype), want)

    groups = permutable(graph)
    if not groups:
        return Check("permutation", True, math.nan, "no groups")
    error = error_of(groups)
    detail = f"{len(groups)} groups"
    if error > tolerance:
        for group in groups:
            if error_of([group]) > tolerance:
                detail = f"the units of {group.name} are not interchangeable"
                break
    return Check("permutation", error <= tolerance, error, detail)
