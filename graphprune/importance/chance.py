"""No worth at all: "random", the baseline for every other criterion."""

from __future__ import annotations

from ..dependency.groups import Group
from .context import Floats, ImportanceContext
from .registry import criterion


@criterion("random", comparable=True)
def random(context: ImportanceContext, group: Group) -> Floats:
    """Uniform in [0, 1), from the seed and the group's index: the same again for the same seed. Reads no weight."""
    scores: Floats = context.generator(group).random(group.size)
    return scores
