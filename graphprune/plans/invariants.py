"""What holds of every plan, whoever wrote it: what it changes is part of the structure that it describes."""

from __future__ import annotations

import itertools

from ..errors import GraphPruneError
from ..support.suggestions import check_choice
from .data import PlanData
from .rewriting import OUTPUTS
from .structure import shape_in
from .surgery import fold_names


def check_invariants(plan: PlanData) -> None:
    """Raise GraphPruneError, naming the first entry that cannot be, unless the plan is in itself possible."""
    check_choice("not a plan: output", plan.output, OUTPUTS)
    _check_indices(plan)
    _check_layers(plan)
    _check_factors(plan)


def _check_layers(plan: PlanData) -> None:
    for e in plan.experts:
        shape = plan.structure.get(e.router)
        if not shape or (e.gone and e.gone[-1] >= shape[0]):
            raise GraphPruneError(f"the plan leaves out experts of {e.router!r} that it does not describe")
    if plan.layers and plan.experts:
        raise GraphPruneError("a plan that leaves layers out leaves out no experts; make a second plan for that")
    paths = [path for block in plan.layers for path in block.modules]
    for path in paths:
        if not any(name.startswith(f"{path}.") for name in plan.structure):
            raise GraphPruneError(f"the plan leaves out {path!r}, which it does not describe")
    gone = tuple(f"{path}." for path in paths)
    modules = [*(a.module for a in plan.attributes), *(path for path, _ in plan.caches)]
    modules += [r.module for r in plan.rewrites]
    modules += [name for fold in plan.folds for name in (fold.layer, fold.batch_norm)]
    for name in (*plan.removed, *(r.parameter for r in plan.rescales), *(f"{m}." for m in modules)):
        if name.startswith(gone):
            raise GraphPruneError(f"the plan changes {name.rstrip('.')}, which lies in a layer that it leaves out")


def _check_indices(plan: PlanData) -> None:
    ordered: dict[int, bool] = {}  # lists that many axes share are looked at once
    for name, axes in plan.removed.items():
        shape = plan.structure.get(name)
        for at, gone in axes.items():
            if shape is None or not 0 <= at < len(shape):
                raise GraphPruneError(f"the plan removes from axis {at} of {name}, which it does not describe")
            if len(gone) >= shape[at]:
                raise GraphPruneError(f"the plan removes all of axis {at} of {name}; at least one must stay")
            if id(gone) not in ordered:
                ordered[id(gone)] = all(a < b for a, b in itertools.pairwise(gone))
            if not ordered[id(gone)] or (gone and not 0 <= gone[0] <= gone[-1] < shape[at]):
                raise GraphPruneError(
                    f"the plan's indices for axis {at} of {name} must be increasing and lie in [0, {shape[at]})"
                )


def _check_factors(plan: PlanData) -> None:
    """Folds and rescales name what the plan describes."""
    for fold in plan.folds:
        layer, norm = fold_names(fold)[0], f"{fold.batch_norm}.running_mean"
        if layer not in plan.structure or norm not in plan.structure:
            raise GraphPruneError(f"the plan folds {fold.batch_norm} into {fold.layer}, which it does not describe")
        if fold.axis not in (0, 1):
            raise GraphPruneError(f"the plan folds {fold.batch_norm} along axis {fold.axis}; expected 0 or 1")
    if len({f.layer for f in plan.folds}) + len({f.batch_norm for f in plan.folds}) != 2 * len(plan.folds):
        raise GraphPruneError("the plan folds two batch norms into one layer, or one into two")
    for scale in plan.rescales:
        shape = shape_in(plan.structure, scale.parameter) or ()
        at = scale.indices
        inside = 0 <= scale.axis < len(shape) and len(at) <= shape[scale.axis]
        if not inside or (at and not 0 <= min(at) <= max(at) < shape[scale.axis]):
            raise GraphPruneError(
                f"the plan rescales axis {scale.axis} of {scale.parameter} by {scale.factor}, which cannot be"
            )
