"""Criteria by name: one decorated function each, resolved and checked in one place."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..dependency.groups import Group
from ..errors import GraphPruneError
from ..support.registry import Registry
from ..support.suggestions import check_choice
from .context import Floats, ImportanceContext

CriterionFunction = Callable[[ImportanceContext, Group], Any]
_F = TypeVar("_F", bound=CriterionFunction)
How = Literal["mean", "max", "sum"]
Needs = Literal["inputs", "loss"] | None
Reduction = Literal["mean", "sum", "max", "min", "prod", "first"]
_REDUCTIONS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda v: v.mean(0),
    "sum": lambda v: v.sum(0),
    "max": lambda v: v.max(0),
    "min": lambda v: v.min(0),
    "prod": lambda v: v.prod(0),
    "first": lambda v: v[0],
}
_reduction: contextvars.ContextVar[str] = contextvars.ContextVar("reduction", default="mean")


@contextlib.contextmanager
def _reducing(reduction: str) -> Iterator[None]:
    token = _reduction.set(reduction)
    try:
        yield
    finally:
        _reduction.reset(token)


def reduced(vectors: Floats) -> Floats:
    """One row of scores from one per member, (members, units) -> (units,), by the running criterion's reduction."""
    return _REDUCTIONS[_reduction.get()](vectors)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A named function from a group to one score per unit; the higher, the rather the unit is kept.

    `comparable`: the scores of different groups are on one scale as they are, so that ranking across groups
    should use them raw; otherwise `normalise` them first. `needs`: "inputs" or "loss" where the function reads
    `context.calibration`, which is there only if the caller passed data (and a loss function). `reduction`,
    `normaliser`: see `with_options`. `folded`: it sees the weights that layers have once the batch norms behind them
    are folded in, instead of those that they have.
    """

    name: str
    function: CriterionFunction
    comparable: bool = False
    needs: Needs = None
    reduction: Reduction = "mean"
    normaliser: How | None = "mean"
    folded: bool = False

    def check_data(self, data: Any) -> None:
        """Raise GraphPruneError unless the data that the criterion needs were passed."""
        if self.needs is not None and data is None:
            pairs = "(inputs, targets), or dicts with the model's labels" if self.needs == "loss" else "inputs"
            raise GraphPruneError(
                f"criterion '{self.name}' needs data: pass data=, a loader or list of batches that yields {pairs}"
            )

    def __call__(self, context: ImportanceContext, group: Group) -> Floats:
        """Scores of the group's units: float64, shape (group.size,), finite. Runs without recording gradients.

        Raises GraphPruneError, naming the criterion and the group, if the function fails, returns another shape or
        something that is no real number, or if a score is NaN or infinite; then the parameters to blame are named.
        """
        try:
            # what overflows or divides by zero is found in the result, with a better message than NumPy's warning
            with torch.no_grad(), np.errstate(all="ignore"), _reducing(self.reduction):
                result = self.function(context, group)
            scores = _as_vector(result)
        except GraphPruneError:
            raise
        except Exception as error:
            raise GraphPruneError(
                f"criterion '{self.name}' failed on {_describe(group)}: {type(error).__name__}: {error}"
            ) from error
        if scores is None:
            raise GraphPruneError(
                f"criterion '{self.name}' returned {_kind(result)} for {_describe(group)}: expected {group.size} real "
                f"numbers, one per unit"
            )
        if scores.shape != (group.size,):
            raise GraphPruneError(
                f"criterion '{self.name}' returned shape {scores.shape} for {_describe(group)}: expected "
                f"({group.size},), one score per unit"
            )
        if not np.isfinite(scores).all():
            raise GraphPruneError(self._blame(scores, context, group))
        return scores

    def _blame(self, scores: Floats, context: ImportanceContext, group: Group) -> str:
        count = int((~np.isfinite(scores)).sum())
        bad = context.nonfinite(group)
        if bad:
            names = ", ".join(f"'{name}'" for name in bad)
            reason = f"NaN or infinite values in {names}; repair these weights before pruning"
        else:
            reason = "the weights are finite, so the criterion divides by zero or overflows here; use another one"
        return f"criterion '{self.name}' gave {count} NaN or infinite scores for {_describe(group)}: {reason}"


CRITERIA: Registry[Criterion] = Registry("criterion")


DEFAULT = "flow"
"""The criterion where none is named."""


def criterion(
    name: str, *, comparable: bool = False, needs: Needs = None, folded: bool = False
) -> Callable[[_F], _F]:
    """Register a function `(context, group) -> scores` under `name`, for `prune(..., criterion=name)`.

    The function returns anything array-like of shape (group.size,); the higher a score, the rather its unit is kept.
    `comparable`, `needs`, `folded`: see `Criterion`. The function itself is returned unchanged. Defining the same
    function again (in a notebook) replaces it; another function under a taken name raises GraphPruneError.
    """
    if not isinstance(name, str) or not name.strip():
        raise GraphPruneError(f"criterion: expected a name, got {name!r}; write @criterion(\"name\")")

    def register(function: _F) -> _F:
        CRITERIA.add(name, Criterion(name, function, comparable, needs, folded=folded), function)
        return function

    return register


def known_criteria() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(CRITERIA))


def normalise(scores: npt.ArrayLike, how: How | None = "mean") -> Floats:
    """Scores of one group brought to a scale on which groups can be compared; the order inside stays.

    `how`: "mean" (default) - the group's average becomes 1, a score says how a unit compares with its own group;
    "max" - the best unit of every group becomes 1; "sum" - shares of the group, so units of large groups weigh less;
    None - unchanged, for criteria that are comparable as they are. The divisor is taken over absolute values, so that
    negative scores keep their order. A group that is zero throughout stays zero.

    Raises GraphPruneError for another `how`.
    """
    check_choice("normalise", how, ("mean", "max", "sum", None))
    values: Floats = np.array(scores, dtype=np.float64)
    size = np.abs(values)
    top = float(size.max(initial=0.0))
    if how is None or top == 0.0:
        return values
    # dividing by the largest first keeps the sum of huge and of tiny scores in range
    values, size = values / top, size / top
    if how == "mean":
        values = values / size.mean()
    elif how == "sum":
        values = values / size.sum()
    return values


def _as_vector(result: Any) -> Floats | None:
    """Any array-like as float64 on the host; None if it does not hold real numbers."""
    if isinstance(result, Tensor):
        if result.is_complex():
            return None
        if result.is_meta:
            raise GraphPruneError(
                "the scores are on the meta device, because the model has no values: load its weights first, or use "
                "criterion='random', which needs none"
            )
        result = result.detach().to("cpu", torch.float64).numpy()
    elif isinstance(result, (list, tuple)):
        result = [float(item) if isinstance(item, Tensor) else item for item in result]
    array = np.asarray(result)
    return array.astype(np.float64) if array.dtype.kind in "fiub" else None


def _describe(group: Group) -> str:
    return f"group {group.index} ({group.name}, {group.size} units)"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
