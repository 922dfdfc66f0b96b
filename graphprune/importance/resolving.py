"""Which criterion is meant: a name, a function, or an importance object of another library."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from ..errors import GraphPruneError
from ..support.suggestions import check_choice
from .registry import _REDUCTIONS, CRITERIA, DEFAULT, Criterion, How, Reduction, known_criteria


def with_options(
    criterion: Any, *, reduction: Reduction | None = None, normaliser: How | Literal["none"] | None = None
) -> Criterion:
    """The same criterion with another way to join the members of a group, or to compare groups.

    `reduction`: how the scores of several layers that make (or read) the same channels become one: "mean" (of most
    criteria the default), "sum", "max", "min", "prod" or "first" (the first layer alone). Criteria that sum by their
    definition ("taylor_gate", "fisher", "reconstruction") are not affected. `normaliser`: how groups are brought to one
    scale before they are ranked together: "mean", "max" or "sum" (see `normalise`), or "none". Default of both: as is.

    >>> from graphprune.importance import with_options
    >>> with_options("l2", reduction="max", normaliser="sum").reduction
    'max'

    Raises GraphPruneError for unknown criteria and options.
    """
    found = resolve_criterion(criterion)
    if reduction is not None:
        check_choice("reduction", reduction, _REDUCTIONS)
        found = dataclasses.replace(found, reduction=reduction)
    if normaliser is not None:
        check_choice("normaliser", normaliser, ("mean", "max", "sum", "none"))
        how: How | None = None if normaliser == "none" else normaliser
        found = dataclasses.replace(found, comparable=how is None, normaliser=how)
    return found


def resolve_criterion(criterion: Any = None) -> Criterion:
    """The criterion meant by a registered name, a function `(context, group) -> scores`, or an object of
    `torch_pruning.importance`; a `Criterion` is returned as it is. None is the default, "flow".

    Raises GraphPruneError for an unknown name, with the known ones and the nearest, and for anything else.
    """
    criterion = DEFAULT if criterion is None else criterion
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return CRITERIA.find(criterion)
    if isinstance(criterion, type):
        name = criterion.__name__
        raise GraphPruneError(f"criterion: got the class {name}; pass an instance, {name}()")
    if _is_torch_pruning_importance(criterion):
        from .torch_pruning import TorchPruningCriterion

        # That library normalises inside and compares groups by what comes out.
        return Criterion(f"torch_pruning.{type(criterion).__name__}", TorchPruningCriterion(criterion), comparable=True)
    for known in CRITERIA.values():
        if known.function is criterion:
            return known
    if callable(criterion):
        return Criterion(getattr(criterion, "__name__", type(criterion).__name__), criterion)
    raise GraphPruneError(
        f"criterion: expected one of {', '.join(known_criteria())}, a function (context, group) -> scores, or a "
        f"torch_pruning importance object; got {type(criterion).__name__}"
    )


def _is_torch_pruning_importance(value: object) -> bool:
    # An instance can only exist if its module was imported: no need to import it here.
    module = sys.modules.get("torch_pruning.pruner.importance")
    return module is not None and isinstance(value, module.Importance)
