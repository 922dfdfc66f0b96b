"""What the user asked for, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...dependency import GroupKind
from ...errors import GraphPruneError
from ...support.suggestions import check_choice
from .budget import Budget
from .selection import kinds_of
from .steps import AUTO, RoundTo, check_round_to, widths

SCOPES = ("local", "global", "isomorphic")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    ratio: float | Mapping[str, float]
    scope: str = "local"
    round_to: RoundTo = 1
    min_channels: int = 1
    granularity: str | Sequence[str] = "auto"
    budget: Budget | None = None
    max_ratio: float = 1.0
    steady: bool = False  # granularity "auto" chooses the same groups for every ratio
    even: bool = False  # round_to "auto" gives groups of one size one width

    @classmethod
    def of(cls, ratio: float | Mapping[str, float] | None, budget: Budget | None, **others: Any) -> Settings:
        """From the public arguments, of which `ratio` and `budget` exclude each other; without both, half goes."""
        if budget is not None and not isinstance(budget, Budget):
            raise GraphPruneError(f"budget: expected a graphprune.Budget, got {type(budget).__name__}")
        if budget is not None and ratio is not None:
            raise GraphPruneError("ratio and budget exclude each other: a budget decides how much of each group stays")
        if isinstance(ratio, Mapping) and not all(isinstance(name, str) for name in ratio):
            wrong = next(name for name in ratio if not isinstance(name, str))
            raise GraphPruneError(f"ratio: a dict maps names of modules and parameters to fractions; {wrong!r} is none")
        return cls(0.5 if ratio is None else ratio, budget=budget, **others)

    def check(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_round_to(self.round_to)
        least = self.min_channels
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise GraphPruneError(f"min_channels: expected an integer of at least 1, got {least!r}")
        kinds_of(self.granularity)
        limit = self.max_ratio
        if isinstance(limit, bool) or not isinstance(limit, (int, float, np.floating)) or not 0 < limit <= 1:
            raise GraphPruneError(
                f"max_ratio: expected the largest fraction that a group may lose, in (0, 1], got {limit!r}"
            )

    def floor(self, size: int) -> int:
        """The least number of `size` units that must stay."""
        return min(size, max(1, math.ceil(size * (1 - self.max_ratio) - 1e-9)))

    @property
    def auto(self) -> bool:
        """Whether widths are those that runtimes like."""
        return self.round_to == AUTO

    def widths(self, size: int, kind: GroupKind) -> npt.NDArray[np.int64]:
        """The widths that `size` units of a group of this kind may have."""
        return widths(size, self.round_to, kind.is_head)
