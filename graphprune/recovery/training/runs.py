"""A whole training: epochs, scores, the best weights, checkpoints, and pruning in between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rich.table import Table
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...plans.surgery.copying import clone_with
from ...support.files import check_target
from ...support.numbers import check_integer
from ...support.progress import Stage, stage
from ...support.runs import counted, score
from ...support.tables import Column, render, table
from ...support.types import PathLike
from ...support.walking import all_modules
from .checkpoints import check_fit, load_model, model_state, own_tensors, read_checkpoint, write_checkpoint
from .loop import Trainer, Training
from .objective import Objective
from .penalties import Regularize, penalty_of

Score = Callable[[nn.Module], float]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch: `number` from 1, mean training `loss`, `score` of `evaluate` after it, last learning rate `lr`."""

    number: int
    loss: float
    score: float | None
    lr: float
    seconds: float = dataclasses.field(compare=False, default=0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Finetuning:
    """What `finetune` did.

    `model`: the trained copy. `history`: one entry per epoch. `before`: the score of the model given; `score`: of
    `model`. `best_epoch`: where `patience` was given, the epoch whose weights `model` has (0: none was better than
    before), else None. `stopped_early`: whether `patience` ran out.
    """

    model: nn.Module
    history: tuple[Epoch, ...]
    before: float | None
    score: float | None
    best_epoch: int | None
    stopped_early: bool

    def table(self) -> Table:
        """The epochs as a `rich` table."""
        columns = [
            Column("epoch", "number"),
            Column("loss", "loss", ".4f"),
            Column("score", "score", ".4f"),
            Column("learning rate", "lr", ".2e"),
            Column("seconds", "seconds", ".1f"),
        ]
        return table(self.history, columns)

    def __str__(self) -> str:
        scores = [] if self.before is None else [f"score before: {self.before:.4f}, now: {self.score:.4f}"]
        return render(self.table(), *scores)


class Pruner(Protocol):
    """Prunes while a run goes on. `steps`: before how many of the first epochs it does; scores count for early stop
    from the last of them on."""

    steps: int

    def prune(self, trainer: Trainer, epoch: int) -> float | None:
        """What happens before an epoch (from 0); the score right after it where there is one."""

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What has been done, and to `model`, as JSON."""

    def restore(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        """Give the trainer's model the structure that it had when `state` was called."""


class Run:
    """Trains a copy of `model`, and can be stopped and started at any time."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        options: Training,
        objective: Objective,
        evaluate: Score | None,
        patience: int | None,
        checkpoint: PathLike | None,
        on_epoch: Callable[[Epoch, nn.Module], None] | None,
        pruner: Pruner | None = None,
        settings: Mapping[str, Any] | None = None,
        regularize: Regularize = None,
    ) -> None:
        check_patience(patience, evaluate)
        self.checkpoint = None if checkpoint is None else check_target(checkpoint)
        self.trainer = Trainer(clone_with(model, {}), data, objective, options, model)
        penalty = penalty_of(regularize, model, data, options.epochs * self.trainer.steps)
        self.trainer.penalty = None if penalty is None else penalty.on(self.trainer.model)
        self.flags = {path: module.training for path, module in all_modules(model).items()}
        self.evaluate, self.patience, self.on_epoch, self.pruner = evaluate, patience, on_epoch, pruner
        self.settings = {
            **options.to_dict(),
            **(settings or {}),
            "patience": patience,
            "regularize": None if penalty is None else penalty.settings(),
            "batches": self.trainer.steps,
            "shapes": {name: list(t.shape) for name, t in own_tensors(model).items()},
        }
        self.before: float | None = None
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_score = 0, None

    best_score: float | None

    @property
    def _settled(self) -> int:
        """The number of epochs after which nothing is pruned any more."""
        return 0 if self.pruner is None else max(0, self.pruner.steps - 1)

    def finish(self, name: str) -> Finetuning:
        """Go on to the end; `name`: of the stage that this is."""
        if not self._resume():
            self.before = None if self.evaluate is None else self.evaluate(self.trainer.model)
            if self.pruner is None:
                self._remember(self.before)
        epochs, steps = self.trainer.options.epochs, self.trainer.steps
        with stage(name, epochs * steps, "batches") as now:
            if self.history:
                now.advance(len(self.history) * steps)
            if not epochs and self.pruner is not None:
                self._remember(self.pruner.prune(self.trainer, 0))
            while len(self.history) < epochs and not self._exhausted():
                self._epoch(now)
        model = self.trainer.model
        if self.patience is not None:
            load_model(model, self.best, "the best epoch", "best")
        for path, module in all_modules(model).items():
            module.training = self.flags.get(path, self.flags[""])
        model.zero_grad(set_to_none=True)
        best = None if self.patience is None else self.best_epoch
        score = self.best_score if best is not None else (self.history[-1].score if self.history else self.before)
        return Finetuning(model, tuple(self.history), self.before, score, best, len(self.history) < epochs)

    def _epoch(self, now: Stage) -> None:
        start, done = time.perf_counter(), len(self.history)
        if self.pruner is not None and done < self.pruner.steps:
            self._remember(self.pruner.prune(self.trainer, done))
        loss, rate = self.trainer.epoch(done, now.advance)
        score = None if self.evaluate is None else self.evaluate(self.trainer.model)
        self.history.append(Epoch(done + 1, loss, score, rate, time.perf_counter() - start))
        scored = "" if score is None else f", score {score:.4f}"
        now.tell(f"epoch {done + 1}, loss {loss:.4f}{scored}")
        if self.pruner is None or done + 1 >= self.pruner.steps:
            self._remember(score)
        if self.checkpoint is not None:
            self._write()
        if self.on_epoch is not None:
            self.on_epoch(self.history[-1], self.trainer.model)

    def _remember(self, score: float | None) -> None:
        """Keep the weights of the best epoch so far, the first of equals."""
        if self.patience is None or len(self.history) < self._settled or score is None:
            return
        if self.best_score is None or score > self.best_score:
            self.best_epoch, self.best_score = len(self.history), score
            self.best = {n: t.detach().clone() for n, t in model_state(self.trainer.model, "best").items()}

    def _exhausted(self) -> bool:
        return self.patience is not None and self.best_score is not None and (
            len(self.history) - self.best_epoch >= self.patience
        )

    def _write(self) -> None:
        assert self.checkpoint is not None
        about, tensors = self.trainer.state()
        about |= {
            "settings": self.settings,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "before": self.before,
            "best": [self.best_epoch, self.best_score],
            "pruner": None if self.pruner is None else self.pruner.state(self.trainer.model),
        }
        write_checkpoint(self.checkpoint, about, {**tensors, **self.best})

    def _resume(self) -> bool:
        found = None if self.checkpoint is None else read_checkpoint(self.checkpoint, self.settings)
        if found is None:
            return False
        about, tensors = found
        what = f"the checkpoint {self.checkpoint}"
        try:
            self._take(about)
            if self.pruner is not None:
                self.pruner.restore(self.trainer, about["pruner"])
            self.trainer.load(about, tensors, what)
            self.best = {name: tensor for name, tensor in tensors.items() if name.startswith("best/")}
            self._check_best()
        except GraphPruneError as error:
            raise GraphPruneError(f"{what} cannot be used: {error}; delete it to start again") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise GraphPruneError(
                f"{what} is damaged ({type(error).__name__}: {error}); delete it to start again"
            ) from error
        return True

    def _take(self, about: Mapping[str, Any]) -> None:
        """History and scores; TypeError and the like for what no run of these settings can have written."""
        self.history = [_epoch(entry, number) for number, entry in enumerate(about["history"], 1)]
        if not 0 < len(self.history) <= self.trainer.options.epochs:
            raise ValueError(f"{len(self.history)} of {self.trainer.options.epochs} epochs are done")
        self.before, (best, reached) = score(about["before"]), about["best"]
        self.best_epoch, self.best_score = counted(best, len(self.history)), score(reached)
        scored = [self.before, *(epoch.score for epoch in self.history)]
        if any((value is None) == (self.evaluate is not None) for value in scored):
            raise ValueError("scores are missing")

    def _check_best(self) -> None:
        """The weights of the best epoch fit the model, before anything else is trained."""
        if self.best:
            check_fit(self.trainer.model, self.best, "the best epoch", "best")
        if bool(self.best) != (self.best_score is not None):
            raise ValueError("the weights of the best epoch are missing")


def _epoch(entry: Any, number: int) -> Epoch:
    found = Epoch(**entry)
    if found.number != number or any(score(n) is None for n in (found.loss, found.lr, found.seconds)):
        raise ValueError(f"the history is not that of epoch {number}")
    return dataclasses.replace(found, score=score(found.score))


def check_patience(patience: int | None, evaluate: Any) -> None:
    """Raise GraphPruneError unless there is something to be patient about."""
    if patience is None:
        return
    check_integer("patience", patience, 1)
    if evaluate is None:
        raise GraphPruneError("patience: needs a score to wait for; pass evaluate=")
