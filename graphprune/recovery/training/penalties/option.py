"""The option `regularize` of trainings: a penalty, by name or ready made."""

from __future__ import annotations

from typing import Any

from torch import nn

from ....errors import GraphPruneError
from ....importance.calibration import ONE_INPUT, CalibrationData
from ....support.randomness import random_state_kept
from ....support.suggestions import check_choice
from .kinds import GroupLasso, GrowingPenalty
from .penalty import GroupPenalty

Regularize = GroupPenalty | str | None
_NAMES = (GroupLasso.kind, GrowingPenalty.kind)


def check_regularize(regularize: Any) -> None:
    """Raise GraphPruneError for what is no penalty and no name of one."""
    if regularize is not None and not isinstance(regularize, GroupPenalty):
        check_choice("regularize", regularize, _NAMES, "a graphprune.GroupLasso or GrowingPenalty of the model")


def penalty_of(regularize: Regularize, model: nn.Module, data: Any, steps: int) -> GroupPenalty | None:
    """The penalty on `model` for a training on `data` of so many steps; for the inputs of its first batch where only
    the name is given."""
    check_regularize(regularize)
    if regularize is None:
        return None
    try:
        if isinstance(regularize, GroupPenalty):
            return regularize.on(model)
        with random_state_kept(data):
            example = next(CalibrationData(data, ONE_INPUT, model).inputs())
        if regularize == GroupLasso.kind:
            return GroupLasso(model, example)
        return GrowingPenalty(model, example, steps=max(1, steps // 2))
    except GraphPruneError as error:
        raise GraphPruneError(f"regularize: {error}") from error
