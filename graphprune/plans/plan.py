"""The plan: what goes, as data. Can be read, compared, edited, stored as JSON and applied to a copy of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..support.doors import door
from ..support.types import PathLike
from . import application, document, printing
from .data import PlanData
from .history import remember
from .structure import structure_of
from .surgery import Fold


@dataclasses.dataclass(frozen=True)
class Plan(PlanData):
    """Which indices of which parameter axes go, and everything that must change with them.

    `removed`: parameter or buffer name -> {axis: sorted removed indices, in the original numbering}. Of a weight that
    the model computes from other tensors (weight norm, spectral norm, parametrisations) it lists these.
    `attributes`: integer attributes of modules that must change. `folds`: Conv-BN pairs that are merged first.
    `rescales`: rows multiplied by a factor, so that attention keeps its temperature. `groups`: every group, with how
    much of it stays. `frozen`: what could not be removed, and why, one line each. `structure`: names and shapes of the
    model the plan was made for. `output`: "module", "hybrid" or "graph". `rewrites`: modules that are replaced by
    graphs of their recorded calls. `statistics`: whether something is removed that a norm, softmax or mean runs over.
    `versions`: of this library and of torch, when the plan was made.
    `caches`: (module, attribute) of dicts in which the model keeps tensors computed from its parameters; they are
    emptied. `layers`: layers that are left out; whatever else the plan changes lies outside them, and all names are
    those of the model with these layers.
    `experts`: mixtures that lose experts; `removed` then cuts routers and stacked weights, and nothing else.
    `unsettled`: attributes that nothing read and that may be out of date, each with the reason.
    `latency`: what was asked, predicted and measured, where the budget was one of latency.
    """

    @door("model")
    def apply(self, model: nn.Module) -> nn.Module:
        """A pruned copy of `model`, which must have the names and shapes the plan was made for. The copy remembers the
        plan: `graphprune.save` writes it beside the weights.

        Raises GraphPruneError, naming the first parameter that differs, when it has not, and where a plan that was
        changed cannot be carried out. `model` is never touched.
        """
        return remember(application.apply(self, model), model, self)

    @door("model")
    def operated(self, model: nn.Module) -> nn.Module:
        """The pruned copy while the layers that are left out still have their places, and all others their names."""
        return application.operated(self, model)

    @door("model")
    def check(self, model: nn.Module) -> None:
        """Raise GraphPruneError unless the plan fits `model`."""
        application.check(self, model)

    def summary(self) -> str:
        """What is removed and what is not, for people."""
        return printing.summary(self)

    def __str__(self) -> str:
        return printing.summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return document.to_dict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`; what `save` wrote, with its digest, is taken too.

        Raises GraphPruneError for anything that is not a plan, does not match its digest, or lost or gained an entry.
        """
        return document.from_dict(data, cls)

    def save(self, path: PathLike) -> Path:
        """Write the plan as JSON with a digest, to a temporary name first. Raises GraphPruneError when the path cannot
        be written."""
        return document.save(self, path)

    @classmethod
    def load(cls, path: PathLike) -> Plan:
        """Read a plan written by `save`. Whoever changed it by hand removes its entry "digest".

        Raises GraphPruneError when there is none, it is damaged, was changed since it was written, or lost an entry.
        """
        return document.load(path, cls)


def check_plan(plan: Any, model: nn.Module) -> None:
    """Raise GraphPruneError unless it is a plan, and one for `model`."""
    if not isinstance(plan, Plan):
        raise GraphPruneError(f"plan: expected what graphprune.plan returns, got {type(plan).__name__}")
    plan.check(model)


def folding(model: nn.Module, folds: Sequence[Fold]) -> Plan:
    """The plan that removes nothing and merges these batch norms into their layers."""
    return Plan(removed={}, folds=tuple(folds), structure=structure_of(model))
