"""How `recover="blocks"` goes about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ....errors import GraphPruneError
from ....support.numbers import check_integer, check_number


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
    - `seed`: of the order of the samples, and of what `augment` draws (default 0).
    - `augment`: a function that a step's batch goes through before both networks see it (default None), so that every
      pass sees other inputs: mirrored or shifted images, masked tokens. It gets and returns what the model takes, a
      tensor, or a tuple or dict of arguments, with as many samples; whatever the network should be the same on is
      right, as the dense one answers to the same. Held inputs stay as they are. torchvision's transforms choose once
      for a whole batch: `torch.stack([transform(image) for image in batch])` chooses for each image.

    Raises GraphPruneError for values out of range, and where `augment` returns something else.
    """

    passes: int = 30
    lr: float = 0.01
    batch_size: int = 64
    together: bool = True
    outputs: float = 1.0
    seed: int = 0
    augment: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("passes", 1), ("batch_size", 1), ("seed", 0)):
            check_integer(f"BlockFit: {name}", getattr(self, name), least)
        check_number("BlockFit: lr", self.lr, above=True)
        check_number("BlockFit: outputs", self.outputs)
        if not isinstance(self.together, bool):
            raise GraphPruneError(f"BlockFit: together must be True or False, got {self.together!r}")
        if self.augment is not None and not callable(self.augment):
            raise GraphPruneError(f"BlockFit: augment: expected a function of one batch, got {self.augment!r}")
