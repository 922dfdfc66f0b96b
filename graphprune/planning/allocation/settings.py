"""What allocation needs to know of a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .budget import Budget
from .kinds import Kinds
from .rounding import Rounding


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of a request that says how many units of which groups go; all of it is checked already.

    `ratio`: None under a budget.
    """

    ratio: float | Mapping[str, float] | None
    scope: str = "local"
    kinds: Kinds = dataclasses.field(default_factory=Kinds)
    rounding: Rounding = dataclasses.field(default_factory=Rounding)
    budget: Budget | None = None
    steady: bool = False  # without kinds, the same groups are chosen for every ratio
    even: bool = False  # groups of one size get one width where these are "auto"
