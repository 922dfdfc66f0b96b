"""How `recover="blocks"` goes about it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ....errors import GraphPruneError


@dataclasses.dataclass(frozen=True)
class BlockFit:
    """The repair "blocks" with other settings than its own, in the place of that name:
    `graphprune.prune(model, x, 0.5, data=inputs, recover=graphprune.BlockFit(passes=100))`.

    - `passes`: how often all the data are gone through (default 30). Time grows with it; so does, slowly, what is won.
    - `lr`: the learning rate of Adam, as a share of the root mean square of each tensor (default 0.01); it rises over
      the first twentieth of the steps and falls along half a cosine to zero.
    - `batch_size`: samples of a step (default 64). Batches of `data` that cannot be joined (texts of other lengths,
      say) are taken as they come, and cut where they are longer.
    - `together`: fit all blocks in each step (default), or one after the other, each for all passes on the repaired
      blocks before it, which takes as many times longer and is rarely better.
    - `outputs`: how much the network's outputs count beside the mean over its blocks (default 1).
    - `seed`: of the order of the samples (default 0).

    Raises GraphPruneError for values out of range.
    """

    passes: int = 30
    lr: float = 0.01
    batch_size: int = 64
    together: bool = True
    outputs: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("passes", 1), ("batch_size", 1), ("seed", 0)):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise GraphPruneError(f"BlockFit: {name} must be an integer of at least {least}, got {value!r}")
        for name, low in (("lr", "above 0"), ("outputs", "of at least 0")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "lr" and value == 0):
                raise GraphPruneError(f"BlockFit: {name} must be a number {low}, got {value!r}")
        if not isinstance(self.together, bool):
            raise GraphPruneError(f"BlockFit: together must be True or False, got {self.together!r}")
