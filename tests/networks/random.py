"""Random networks: the same seed always makes the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import random_blocks as images
from . import random_tokens as sequences
from .random_blocks import Block, Rng, pick, width
from .registry import BATCH, settle

WIDEST = 28
LARGEST = 12
LONGEST = 40


class Join(Block):
    """Several values of one size become one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, *values: Tensor) -> Tensor:
        if self.how == "cat":
            return torch.cat(values, 1 if values[0].dim() != 3 else -1)
        if self.how == "cat_negative":
            return torch.cat(values, -3 if values[0].dim() == 4 else -1)
        total = values[0]
        if self.how == "stack":
            return torch.stack(values).mean(0)
        for value in values[1:]:
            if self.how == "add":
                total = total + value
            elif self.how == "gate":
                total = total * value.sigmoid()
            elif self.how == "maximum":
                total = torch.maximum(total, value)
            else:
                total = total - 0.5 * value
        return total


class Rescale(Block):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class RandomNetwork(nn.Module):
    """Blocks, each reading some of the values before it; the input is value 0."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.order: list[int] = []
        self.sources: list[tuple[int, ...]] = []
        self.results: list[int] = []
        self.form = "tensor"

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for block, sources in zip(self.order, self.sources, strict=True):
            values.append(self.blocks[block](*[values[i] for i in sources]))
        results = [values[i] for i in self.results]
        if self.form == "tensor":
            return results[0]
        return {f"out{i}": value for i, value in enumerate(results)} if self.form == "dict" else tuple(results)

    @property
    def statistics(self) -> bool:
        """Whether a statistic over channels is taken, so that zeroing is no exact reference."""
        return any(getattr(block, "statistics", False) for block in self.blocks)

    @property
    def temperature(self) -> bool:
        """Whether there is an attention whose temperature may be folded into its queries."""
        return any(getattr(block, "temperature", False) for block in self.blocks)


def random_network(seed: int) -> tuple[RandomNetwork, Tensor]:
    """A network of 4 to 14 blocks with settled weights, in eval mode, and an example of two samples."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model, example = _Builder(rng).build()
    model.eval()
    return model, example


class _Builder:
    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.model = RandomNetwork()
        self.values: list[Tensor] = []

    def build(self) -> tuple[RandomNetwork, Tensor]:
        rng = self.rng
        shapes = [(3, 8, 8), (3, 6, 6), (4, 6, 8), (2, 4, 4), (7, 9), (5, 12)]
        example = torch.randn(BATCH, *shapes[int(rng.choice(6, p=[0.25, 0.25, 0.15, 0.15, 0.15, 0.05]))])
        self.values.append(example)
        for _ in range(int(rng.integers(3, 12))):
            self.extend()
        self.finish()
        return self.model, example

    def add(self, block: nn.Module, *sources: int, again: int | None = None) -> int:
        """Apply a block to values and keep the result within a sensible range; the index of the result."""
        model = self.model
        block.eval()
        if again is None:
            settle(block)
        result = block(*[self.values[i].clone() for i in sources])
        if again is None:
            model.blocks.append(block)
        model.order.append(len(model.blocks) - 1 if again is None else again)
        model.sources.append(sources)
        self.values.append(result)
        spread = float(result.std())
        if not 0.2 < spread < 4 and again is None and not isinstance(block, Rescale):
            return self.add(Rescale(round(1 / max(spread, 1e-3), 3)), len(self.values) - 1)
        return len(self.values) - 1

    def source(self) -> int:
        """Mostly the latest value."""
        count = len(self.values)
        return count - 1 if self.rng.random() < 0.75 else int(self.rng.integers(max(0, count - 5), count))

    def extend(self) -> None:
        rng, at = self.rng, self.source()
        if rng.random() < 0.3 and self.join(at):
            return
        if rng.random() < 0.15 and self.repeat(at):
            return
        value = self.values[at]
        if value.dim() == 4:
            self.image(at, value)
        elif value.dim() == 3:
            self.tokens(at, value)
        else:
            self.vector(at, value)

    def join(self, at: int) -> bool:
        rng, value = self.rng, self.values[at]
        space = value.shape[2:] if value.dim() != 3 else value.shape[1:2]

        def fits(other: Tensor) -> bool:
            spatial = other.shape[2:] if other.dim() != 3 else other.shape[1:2]
            return other.dim() == value.dim() and spatial == space

        others = [i for i, other in enumerate(self.values) if i != at and fits(other)]
        if not others:
            return False
        axis = 1 if value.dim() != 3 else 2
        other = pick(rng, others)
        if rng.random() < 0.5:
            parts = [at, other] + ([pick(rng, others)] if rng.random() < 0.3 else [])
            parts = [parts[i] for i in rng.permutation(len(parts))]
            if sum(self.values[i].shape[axis] for i in parts) <= WIDEST:
                self.add(Join(pick(rng, ["cat", "cat", "cat_negative"])), *parts)
                return True
        if self.values[other].shape != value.shape:
            other = self.project(other, value.shape[axis])
        self.add(Join(pick(rng, ["add", "add", "add", "subtract", "gate", "maximum", "stack"])), at, other)
        return True

    def project(self, at: int, outputs: int) -> int:
        """Another number of channels, everything else equal."""
        value = self.values[at]
        if value.dim() == 4:
            return self.add(images.ConvUnit(self.rng, value.shape[1], 1, outputs), at)
        return self.add(sequences.LinearUnit(self.rng, value.shape[-1], value.dim() == 2, outputs), at)

    def repeat(self, at: int) -> bool:
        """Call an earlier block once more, on another value."""
        model, shape = self.model, self.values[at].shape
        fitting = [
            block for block, sources in zip(model.order, model.sources, strict=True)
            if len(sources) == 1 and self.values[sources[0]].shape == shape and not _trivial(model.blocks[block])
        ]  # fmt: skip
        if not fitting:
            return False
        block = pick(self.rng, fitting)
        self.add(model.blocks[block], at, again=block)
        return True

    def image(self, at: int, value: Tensor) -> None:
        rng = self.rng
        _, c, h, w = value.shape
        size = min(h, w)
        if c > WIDEST:
            self.project(at, width(rng))
        elif max(h, w) > LARGEST:
            self.add(nn.AvgPool2d(2), at)
        elif h * w <= LONGEST and rng.random() < 0.12:
            tokens = self.add(sequences.ImageToTokens(rng), at)
            if rng.random() < 0.8:
                self.tokens(tokens, self.values[tokens])
        elif rng.random() < 0.05:
            self.add(sequences.ToVector(rng, value), at)
        elif at == 0 or c < 4 or rng.random() < 0.25:
            self.add(images.ConvUnit(rng, c, size), at)
        else:
            makers: list[Callable[[], nn.Module]] = [
                lambda: images.ResidualUnit(rng, c, size),
                lambda: images.ResidualUnit(rng, c, size),
                lambda: images.Gate(rng, c, size),
                lambda: images.Shuffle(rng, c, size),
                lambda: images.Divide(rng, c, size),
                lambda: images.Divide(rng, c, size),
                lambda: images.Reorder(rng, c, size),
                lambda: images.Reorder(rng, c, size),
                lambda: images.Space(rng, c, size),
                lambda: images.Space(rng, c, size),
                lambda: images.BareParameters(rng, c, size, (h, w)),
                lambda: images.GatedChannels(rng, c, size),
                lambda: images.InPlaceWrites(rng, c, size),
                lambda: images.AcrossChannels(rng, c, size),
            ]
            self.add(pick(rng, makers)(), at)

    def tokens(self, at: int, value: Tensor) -> None:
        rng = self.rng
        _, n, c = value.shape
        if at == 0 or c > WIDEST:
            self.project(at, width(rng))
            return
        if rng.random() < 0.15:
            size = next(((h, n // h) for h in (2, 3, 4, 6) if n % h == 0 and n // h > 1), None)
            if size is not None:
                self.add(sequences.TokensToImage(rng, c, size), at)
                return
        if rng.random() < 0.1:
            self.add(sequences.ToVector(rng, value), at)
            return
        makers: list[Callable[[], nn.Module]] = [
            lambda: sequences.LinearUnit(rng, c, False),
            lambda: sequences.FeedForward(rng, c),
            lambda: sequences.Attention(rng, c, n),
            lambda: sequences.Attention(rng, c, n),
            lambda: sequences.AttentionModule(rng, c),
            lambda: sequences.TokenExtras(rng, c, n),
        ]
        if n <= 9:
            makers.append(lambda: sequences.RecurrentUnit(rng, c))
        self.add(pick(rng, makers)(), at)

    def vector(self, at: int, value: Tensor) -> None:
        rng, c = self.rng, value.shape[1]
        if rng.random() < 0.15:
            self.add(sequences.VectorToImage(rng, c), at)
        elif rng.random() < 0.5 and c <= WIDEST:
            self.add(sequences.VectorUnit(rng, c), at)
        else:
            self.add(sequences.LinearUnit(rng, c, True), at)

    def finish(self) -> None:
        """Heads on the last value and on some others, or values returned as they are."""
        rng, model = self.rng, self.model
        read = {i for sources in model.sources for i in sources}
        loose = [i for i in range(1, len(self.values)) if i not in read]
        others = [i for i in loose[:-1] if rng.random() < 0.7]
        for at in [loose[-1], *others][:3]:
            if at != loose[-1] and rng.random() < 0.2:
                model.results.append(at)
                continue
            value = self.values[at]
            if value.dim() == 4:
                kernel = pick(rng, [1, 2]) if min(value.shape[2:]) > 1 else 1
                model.results.append(self.add(nn.Conv2d(value.shape[1], 3, kernel), at))
            else:
                model.results.append(self.add(nn.Linear(value.shape[-1], 4), at))
        model.form = pick(rng, ["tuple", "dict"]) if len(model.results) > 1 else pick(rng, ["tensor", "tensor", "dict"])


def _trivial(block: nn.Module) -> bool:
    return not any(True for _ in block.parameters())
