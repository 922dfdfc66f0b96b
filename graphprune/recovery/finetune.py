"""`finetune`: give a pruned network its accuracy back by training it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..report.files import check_target
from ..report.tables import Column, render, table
from ..surgery.copying import clone_with
from .checkpoints import load_model, model_state, own_tensors, read_checkpoint, write_checkpoint
from .distillation import Distillation
from .evaluation import evaluator
from .objective import LossFunction, Objective
from .randomness import random_state_kept
from .training import MakeOptimizer, Trainer, Training, progress_bar


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

    `model`: the trained copy. `history`: one entry per epoch. `before`: the score of the model given. `best_epoch`: the
    epoch whose weights `model` has where `patience` was given (0: none was better than before), else None.
    `stopped_early`: whether `patience` ran out.
    """

    model: nn.Module
    history: tuple[Epoch, ...]
    before: float | None
    best_epoch: int | None
    stopped_early: bool

    @property
    def score(self) -> float | None:
        """The score of `model`."""
        last = len(self.history) if self.best_epoch is None else self.best_epoch
        return self.history[last - 1].score if last else self.before

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
        before = "" if self.before is None else f"score before: {self.before:.4f}, now: {self.score:.4f}"
        return render(self.table(), *([before] if before else []))


def finetune(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 3,
    loss_fn: LossFunction | None = None,
    optimizer: str | MakeOptimizer = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    clip: float | None = 5.0,
    amp: bool | str = "auto",
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    evaluate: Any = None,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_epoch: Callable[[Epoch, nn.Module], None] | None = None,
) -> Finetuning:
    """Train a copy of `model`; the model itself is not touched. A plain loop: use your own trainer if you have one.

    - `data`: a DataLoader or list of batches (inputs, targets), read once an epoch. Inputs are a tensor, a tuple of
      positional arguments, or a dict of keyword arguments. Batches go to the model's device.
    - `epochs`: how many. `loss_fn(output, targets)`: a scalar; default cross-entropy of logits and class numbers, or,
      without targets, the loss that the model returns itself (`output.loss`).
    - `optimizer`: "sgd" (Nesterov, with `momentum`), "adam", "adamw", or a function (model) -> torch optimizer with its
      own options. `lr`: peak learning rate, default 0.02 for "sgd", 0.001 for the others. `weight_decay`: 5e-4.
    - The rate rises linearly over the fraction `warmup` of all steps and falls to zero along half a cosine. `clip`:
      largest norm of all gradients together (default 5), None for no clipping.
    - `amp`: "auto" (default) for mixed precision on GPUs (bfloat16, or float16 with loss scaling where the GPU has no
      bfloat16), True for it everywhere, False for none.
    - `teacher`: a network to learn from, usually the dense one; `distillation`: how, see `Distillation`. With a teacher
      data need no targets.
    - `evaluate`: a function (model) -> number, higher is better, or data (inputs, targets) for top-1 accuracy; see
      `Evaluation` for other metrics. It is asked before and after every epoch. `patience`: stop after this many epochs
      in a row without a better score, and return the best weights instead of the last.
    - `seed`: all randomness of an epoch (order of batches, dropout, augmentation drawn from torch, numpy or python's
      random) follows from the seed and the epoch's number alone. On one machine the same call gives the same
      weights, bit for bit, as far as torch's operators are deterministic on the device.
    - `checkpoint`: a file (safetensors) that is written after every epoch and read first where it exists: a run that
      was stopped at any moment goes on with the epoch that was under way and ends with the same weights. `epochs` and
      the other numbers must be the same.
    - `on_epoch(epoch, model)`: called after every epoch. `progress`: a bar on standard error if that is a terminal.

    Masks of `graphprune.sparsity` stay in force.

    Raises GraphPruneError for arguments out of range, data in another form, a loss that is not finite, a checkpoint
    of another run, and errors of the model.

    >>> import torch, graphprune
    >>> x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    >>> done = graphprune.finetune(torch.nn.Linear(4, 2), list(zip(x.split(16), y.split(16))), epochs=2)
    >>> len(done.history)
    2
    """
    options = Training(epochs, optimizer, lr, momentum, weight_decay, warmup, clip, amp, seed)
    objective = Objective(loss_fn, teacher, distillation)
    run = _Run(model, data, options, objective, evaluator(evaluate), patience, checkpoint, on_epoch)
    with random_state_kept(data):
        return run.finish(progress)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        options: Training,
        objective: Objective,
        evaluate: Callable[[nn.Module], float] | None,
        patience: int | None,
        checkpoint: str | os.PathLike[str] | None,
        on_epoch: Callable[[Epoch, nn.Module], None] | None,
    ) -> None:
        check_patience(patience, evaluate)
        self.checkpoint = None if checkpoint is None else check_target(checkpoint)
        copied = clone_with(model, {})
        self.trainer = Trainer(copied, data, objective, options)
        self.flags = [module.training for module in model.modules()]
        self.evaluate, self.patience, self.on_epoch = evaluate, patience, on_epoch
        self.settings = {
            **options.to_dict(),
            "patience": patience,
            "batches": self.trainer.steps,
            "shapes": {name: list(t.shape) for name, t in own_tensors(model).items()},
        }
        self.before: float | None = None
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0

    def finish(self, progress: bool) -> Finetuning:
        if not self._resume():
            self.before = None if self.evaluate is None else self.evaluate(self.trainer.model)
            self._remember()
        epochs, steps = self.trainer.options.epochs, self.trainer.steps
        with progress_bar(progress, "fine-tuning", epochs * steps, len(self.history) * steps) as tick:
            while len(self.history) < epochs and not self._exhausted():
                self._epoch(tick)
        if self.patience is not None:
            load_model(self.trainer.model, self.best, "the best epoch", "best")
        for module, training in zip(self.trainer.model.modules(), self.flags, strict=True):
            module.training = training
        best = None if self.patience is None else self.best_epoch
        stopped = len(self.history) < epochs
        return Finetuning(self.trainer.model, tuple(self.history), self.before, best, stopped)

    def _epoch(self, tick: Callable[..., None]) -> None:
        start = time.perf_counter()
        loss, rate = self.trainer.epoch(len(self.history), tick)
        score = None if self.evaluate is None else self.evaluate(self.trainer.model)
        self.history.append(Epoch(len(self.history) + 1, loss, score, rate, time.perf_counter() - start))
        scored = "" if score is None else f", score {score:.4f}"
        tick(text=f"fine-tuning: epoch {len(self.history)}, loss {loss:.4f}{scored}")
        self._remember()
        if self.checkpoint is not None:
            self._write()
        if self.on_epoch is not None:
            self.on_epoch(self.history[-1], self.trainer.model)

    def _score_of(self, epoch: int) -> float:
        score = self.history[epoch - 1].score if epoch else self.before
        assert score is not None
        return score

    def _remember(self) -> None:
        """Keep the weights of the best epoch so far, the first of equals."""
        if self.patience is None:
            return
        if not self.history or self._score_of(len(self.history)) > self._score_of(self.best_epoch):
            self.best_epoch = len(self.history)
            self.best = {n: t.detach().clone() for n, t in model_state(self.trainer.model, "best").items()}

    def _exhausted(self) -> bool:
        return self.patience is not None and len(self.history) - self.best_epoch >= self.patience

    def _write(self) -> None:
        assert self.checkpoint is not None
        about, tensors = self.trainer.state()
        history = [dataclasses.asdict(epoch) for epoch in self.history]
        about |= {"settings": self.settings, "history": history, "before": self.before, "best_epoch": self.best_epoch}
        write_checkpoint(self.checkpoint, about, {**tensors, **self.best})

    def _resume(self) -> bool:
        found = None if self.checkpoint is None else read_checkpoint(self.checkpoint, self.settings)
        if found is None:
            return False
        about, tensors = found
        what = f"the checkpoint {self.checkpoint}"
        self._read_history(about, what)
        self.trainer.load(about, tensors, what)
        self.best = {name: tensor for name, tensor in tensors.items() if name.startswith("best/")}
        return True

    def _read_history(self, about: Mapping[str, Any], what: str) -> None:
        try:
            self.history = [Epoch(**entry) for entry in about["history"]]
            self.before, self.best_epoch = about["before"], int(about["best_epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise GraphPruneError(f"{what} is damaged: {type(error).__name__}: {error}") from error


def check_patience(patience: int | None, evaluate: Any) -> None:
    """Raise GraphPruneError unless there is something to be patient about."""
    if patience is None:
        return
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise GraphPruneError(f"patience: expected an integer of at least 1 or None, got {patience!r}")
    if evaluate is None:
        raise GraphPruneError("patience: needs a score to wait for; pass evaluate=")
