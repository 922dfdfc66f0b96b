"""Lottery tickets: iterative magnitude pruning with rewinding, and the controls it is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..plans.surgery.copying import clone_with
from ..support.doors import door
from ..support.files import check_target
from ..support.numbers import check_integer
from ..support.types import Ignore, Parts, PathLike
from .checkpoints import Progress, read_progress, write_progress
from .magnitudes import magnitude
from .masks import masks as masks_of
from .masks import set_masks
from .ranking import Scope, check_scope, check_sparsity
from .snapshots import PlainState
from .weights import as_names, select_weights

TrainFunction = Callable[[nn.Module, int, int], Any]
EvaluateFunction = Callable[[nn.Module], float]


@dataclasses.dataclass(frozen=True)
class Round:
    """A network trained to the end: how much of it was pruned before that, and its score."""

    sparsity: float
    score: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class LotteryTicket:
    """What `lottery_ticket` found.

    `model`: the ticket after its training, masks in force. `masks`: name -> true where a weight stays. `initial`,
    `rewound`: the state before any training and at step `rewind`, under the names that the model has without masks.
    `rounds`: the dense network, then one for each pruning; the last is the ticket.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    initial: dict[str, Tensor]
    rewound: dict[str, Tensor]
    rewind: int
    rounds: tuple[Round, ...]

    @door()
    def fresh(self) -> nn.Module:
        """A copy of the ticket at step `rewind`, masks in force: train it from there."""
        copied = clone_with(self.model, {})
        PlainState.of(copied).write(self.rewound)
        return copied

    @door()
    def random_reinit(self, build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
        """The control with the ticket's masks on new initial weights: train it from step 0.

        `build()` makes the network as the original was made, with its own initialisation; it is called under `seed`.
        """
        with _seeded(seed):
            model = build()
        return set_masks(model, self.masks)

    @door()
    def random_masks(self, seed: int = 0) -> nn.Module:
        """The control with the ticket's weights at step `rewind`, as many of them pruned in each tensor, at random."""
        generator = torch.Generator().manual_seed(seed)
        shuffled = {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
            for name, mask in self.masks.items()
        }
        return set_masks(self.fresh(), shuffled)


@door("model")
def lottery_ticket(
    model: nn.Module,
    train: TrainFunction,
    sparsity: float,
    *,
    steps: int,
    rounds: int = 5,
    rewind: int = 0,
    evaluate: EvaluateFunction | None = None,
    scope: Scope = "global",
    parameters: Parts = "weights",
    ignore: Ignore = (),
    seed: int = 0,
    checkpoint: PathLike | None = None,
) -> LotteryTicket:
    """Find a sparse network that trains from its own initial weights (Frankle and Carbin, 2019).

    Train; prune the weights of smallest magnitude; set those that stay back to what they were at step `rewind`; repeat.
    Every round prunes the same fraction of what is left, 1 - (1 - sparsity)^(1 / rounds). Buffers (running
    statistics) are set back too. The model given is not changed.

    - `train(model, first, last)`: trains the model in place from step `first` to step `last`, in whatever unit; it
      makes its own optimiser. It is called with torch's random state seeded from `seed` and the round, so that a run
      can be repeated where it draws its randomness from there.
    - `steps`: the last step. `rewind`: 0 (default) for the initial weights, or an early step to go back to (Frankle
      et al., 2020). `evaluate(model)`: a number to keep for each round, on the model in eval mode.
    - `scope`, `parameters`, `ignore`: see `magnitude`.
    - `checkpoint`: a file that is written after each training, and read first where it exists: a run that was stopped
      goes on with the round that was under way and ends with the same result. Its initial weights then count.

    Raises GraphPruneError for arguments out of range, a checkpoint of another run, and for damaged ones.
    """
    run = _Run(
        clone_with(model, {}), train, check_sparsity(sparsity), steps, rounds, rewind, evaluate, scope,
        as_names(model, parameters, "parameters"), as_names(model, ignore, "ignore"), seed, checkpoint,
    )  # fmt: skip
    run.check()
    return run.finish()


@dataclasses.dataclass
class _Run:
    model: nn.Module
    train: TrainFunction
    sparsity: float
    steps: int
    rounds: int
    rewind: int
    evaluate: EvaluateFunction | None
    scope: Scope
    parameters: str | list[str]
    ignore: str | list[str]
    seed: int
    checkpoint: PathLike | None

    def check(self) -> None:
        for name, value, least in (("steps", self.steps, 1), ("rounds", self.rounds, 1), ("rewind", self.rewind, 0)):
            check_integer(f"lottery_ticket: {name}", value, least)
        if self.rewind >= self.steps:
            raise GraphPruneError(f"lottery_ticket: expected rewind < steps, got {self.rewind} and {self.steps}")
        check_scope(self.scope)
        if self.checkpoint is not None:
            check_target(self.checkpoint)
        if masks_of(self.model):
            raise GraphPruneError("lottery_ticket: the model has masks already; start from a dense one")
        select_weights(self.model, self.parameters, self.ignore)

    def finish(self) -> LotteryTicket:
        progress = self._start()
        while len(progress.scores) <= self.rounds:
            done = len(progress.scores)
            self._reset(progress)
            score = self._train(done + 1, self.rewind, self.steps)
            if done < self.rounds:
                magnitude(
                    self.model, self._sparsity_at(done + 1), self.scope, parameters=self.parameters, ignore=self.ignore
                )
                progress = dataclasses.replace(progress, masks=masks_of(self.model))
            else:
                progress = dataclasses.replace(progress, trained=PlainState.of(self.model).copy())
            progress = dataclasses.replace(progress, scores=(*progress.scores, score))
            self._keep(progress)
        self._reset(progress)
        PlainState.of(self.model).write(progress.trained)
        found = tuple(Round(self._sparsity_at(i), score) for i, score in enumerate(progress.scores))
        return LotteryTicket(self.model, progress.masks, progress.initial, progress.rewound, self.rewind, found)

    def _sparsity_at(self, done: int) -> float:
        return self.sparsity if done == self.rounds else 1 - (1 - self.sparsity) ** (done / self.rounds)

    def _start(self) -> Progress:
        state = PlainState.of(self.model)
        shapes = {name: list(tensor.shape) for name, tensor in state.tensors.items()}
        names = ("sparsity", "steps", "rounds", "rewind", "scope", "parameters", "ignore", "seed")
        types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.tensors.items()}
        settings = {**{name: getattr(self, name) for name in names}, "shapes": shapes, "types": types}
        found = None if self.checkpoint is None else read_progress(self.checkpoint, settings)
        if found is not None:
            return found
        initial = state.copy()
        rewound = initial
        if self.rewind:
            self._train(0, 0, self.rewind, score=False)
            rewound = PlainState.of(self.model).copy()
        progress = Progress(settings, initial, rewound)
        self._keep(progress)
        return progress

    def _reset(self, progress: Progress) -> None:
        """Weights and buffers as they were at the rewinding step; the masks found so far stay in force."""
        PlainState.of(self.model).write(progress.rewound)
        set_masks(self.model, progress.masks)

    def _train(self, number: int, first: int, last: int, *, score: bool = True) -> float | None:
        with _seeded(self.seed + number):
            self.model.train()
            self.train(self.model, first, last)
            self.model.eval()
            if not score or self.evaluate is None:
                return None
            value = float(self.evaluate(self.model))
        if not math.isfinite(value):
            raise GraphPruneError(f"lottery_ticket: evaluate returned {value}")
        return value

    def _keep(self, progress: Progress) -> None:
        if self.checkpoint is not None:
            write_progress(self.checkpoint, progress)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random state from a seed inside the block, and as it was after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
