"""`pipeline`: train, prune and fine-tune a network, and report what it cost and gained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import GraphPruneError
from ...planning.allocation import Budget
from ...plans.plan import Plan
from ...recovery import BlockFit, Distillation, Epoch, Finetuning, check_method
from ...recovery.training.evaluation import evaluator, metric_name
from ...recovery.training.loop import MakeOptimizer, Training
from ...recovery.training.objective import Objective
from ...recovery.training.penalties import Regularize, check_regularize
from ...recovery.training.runs import Run
from ...sparsity import make_permanent, masks
from ...sparsity import schedule as make_schedule
from ...sparsity.ranking import check_sparsity
from ...sparsity.scheduler import Method
from ...support.doors import door
from ...support.files import make_folder
from ...support.numbers import check_integer
from ...support.progress import ProgressOption, reported, stage
from ...support.randomness import random_state_kept
from ...support.types import LossFunction, PathLike
from ...tracing.matching import NameTable
from ..reporting.summary import Report, report
from .steps import GradualPruner, PruningStep, method_of


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineResult:
    """What `pipeline` made.

    `model`: the pruned and fine-tuned network, masks made permanent. `dense`: the network before pruning, trained.
    `training`, `tuning`: the two trainings, epoch by epoch. `steps`: when it was pruned, how far, and the score right
    after. `plans`: of structured pruning, each for the network that the one before it left. `report`: sizes, sparsity,
    work, accuracy; see `graphprune.report`.
    """

    model: nn.Module
    dense: nn.Module
    training: Finetuning
    tuning: Finetuning
    steps: tuple[PruningStep, ...]
    plans: tuple[Plan, ...]
    report: Report

    def __str__(self) -> str:
        return str(self.report)

    def to_dict(self) -> dict[str, Any]:
        """The report and the course of the trainings as plain data, ready for JSON; the same for every run."""
        course = {
            name: [{k: v for k, v in dataclasses.asdict(e).items() if k != "seconds"} for e in run.history]
            for name, run in (("training", self.training), ("tuning", self.tuning))
        }
        return {"report": self.report.to_dict(), **course, "steps": [dataclasses.asdict(s) for s in self.steps]}


@door("model")
@reported("pipeline")
def pipeline(
    model: nn.Module,
    example_input: Any,
    data: Any,
    sparsity: float | None = None,
    *,
    method: str | Method = "channels",
    schedule: str = "one-shot",
    budget: Budget | None = None,
    options: Mapping[str, Any] | None = None,
    train_epochs: int = 0,
    prune_epochs: int | None = None,
    finetune_epochs: int = 3,
    train_lr: float | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: str | MakeOptimizer = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    clip: float | None = 5.0,
    amp: bool | str = "auto",
    distillation: Distillation | bool = False,
    regularize: Regularize = None,
    recover: str | BlockFit | None = None,
    calibration: Any = None,
    evaluate: Any = None,
    patience: int | None = None,
    speed: Any = False,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    progress: ProgressOption = None,
    on_epoch: Callable[[Epoch, nn.Module], None] | None = None,
    strict: bool = False,
) -> PipelineResult:
    """Train a copy of `model`, prune it at once or gradually, fine-tune it, and report; `model` stays as it is.

    Training runs in this process: of a model in a DataParallel or DistributedDataParallel the module inside is taken.

    - `data`: training batches (inputs, targets), as for `finetune`. `sparsity`: the fraction to remove, in [0, 1),
      default 0.5; or a `budget` (structured, at once).
    - `method`: "channels" or "layers" (structured, through `graphprune.plan`), "magnitude" or "gradient" (masks, see
      `graphprune.sparsity`), or your own function (model, sparsity) -> model. `options`: further arguments of it, such
      as {"criterion": "taylor", "ignore": ["fc"]} for channels or {"scope": "layer"} for masks.
    - `schedule`: "one-shot" (default): everything before the first epoch of fine-tuning. "linear", "cubic",
      "exponential", "sinusoidal", "zhu-gupta": gradually, before each of `prune_epochs` epochs (default 5), optimizer
      state carried over; see `graphprune.sparsity.schedule`.
    - `train_epochs` (default 0: it is trained), with `train_lr` as peak rate; then pruning, and `finetune_epochs` after
      the last of it. Pruning and fine-tuning share one learning rate curve up to `lr`. `optimizer` to `amp`: as in
      `finetune`.
    - `regularize`: "lasso", "growing", a `GroupLasso` or a `GrowingPenalty`: the training before pruning drives weak
      channels to zero, so that less is lost then; see `finetune`. Needs `train_epochs`.
    - `distillation`: True or a `Distillation`: learn from the dense network too. `recover`: "mean", "batchnorm",
      "least_squares", "blocks" or a `BlockFit` repairs each structured step before training goes on. `calibration`:
      batches for criteria and for `recover`; default `data`.
    - `evaluate`, `patience`, `progress`, `on_epoch`: as in `finetune`; both trainings may stop early, the second only
      once all is pruned. `speed`: measure the latency too, as in `report`.
    - `seed`: everything drawn follows from it and the epoch: the same call gives the same network, bit for bit.
    - `checkpoint`: a folder, made if it is not there, whose two files are written after every epoch and read first: a
      run that was stopped at any moment goes on and ends with the same result.

    - `strict`: whether it is an error, instead of a GraphPruneWarning, where channels or layers were asked to go and
      none went.

    Batch norms are not folded, as training goes on; `graphprune.fold_conv_bn` does it afterwards.

    Raises GraphPruneError for arguments out of range, unknown names, data in another form, checkpoints of another run,
    and errors of the model.
    """
    amount, gradual = _amount(sparsity, budget, schedule, prune_epochs)
    check_method(recover, data)
    if method == "layers" and (recover is not None or gradual is not None):
        raise GraphPruneError("method='layers' leaves layers out at once, and the others have nothing to recover")
    check_regularize(regularize)
    if regularize is not None and train_epochs == 0:
        raise GraphPruneError("regularize: acts in the training before pruning; pass train_epochs, at least 1")
    first = Training(train_epochs, optimizer, train_lr, momentum, weight_decay, warmup, clip, amp, seed)
    tuned = Training(finetune_epochs, optimizer, lr, momentum, weight_decay, warmup, clip, amp, seed)
    tuned = dataclasses.replace(tuned, epochs=finetune_epochs + (gradual or 0))
    curve = _curve(schedule, amount, gradual)
    batches = data if calibration is None else calibration
    options = _by_name(options, model)
    chosen = method_of(method, example_input, budget, options, batches, loss_fn, seed, strict)
    ask = evaluator(evaluate)
    settings = {
        "recover": recover if isinstance(recover, str | None) else repr(recover),
        "method": method if isinstance(method, str) else "own", "schedule": schedule, "sparsity": amount,
        "prune_epochs": gradual, "budget": repr(budget), "options": _told(options),
    }  # fmt: skip
    folder = _folder(checkpoint)
    with random_state_kept(data):
        run = Run(model, data, first, Objective(loss_fn, None, None), ask, patience if train_epochs else None,
                  folder and folder / "training.safetensors", on_epoch, regularize=regularize)  # fmt: skip
        training = run.finish("training")
        pruner = GradualPruner(
            chosen, curve, gradual or 1, evaluate=ask, data=data, calibration=batches, example_input=example_input,
            recovery=recover, seed=seed,
        )  # fmt: skip
        objective = _objective(loss_fn, training.model, distillation)
        run = Run(training.model, data, tuned, objective, ask, patience, folder and folder / "tuning.safetensors",
                  on_epoch, pruner, settings)  # fmt: skip
        tuning = run.finish("pruning and fine-tuning")
    if masks(tuning.model):
        make_permanent(tuning.model)
    with stage("report"):
        found = _report(training.model, tuning, pruner, example_input, evaluate, speed)
    return PipelineResult(
        tuning.model, training.model, training, tuning, tuple(pruner.done), tuple(pruner.plans), found
    )


def _amount(
    sparsity: float | None, budget: Budget | None, name: str, prune_epochs: int | None
) -> tuple[float, int | None]:
    """The sparsity to reach, and over how many epochs; None for at once."""
    make_schedule(name, 0.0, 0.5, 1)  # names are checked there
    at_once = name.lower().replace("_", "-").replace(" ", "-") == "one-shot"
    if budget is not None and not isinstance(budget, Budget):
        raise GraphPruneError(f"budget: expected a graphprune.Budget, got {type(budget).__name__}")
    if budget is not None and sparsity is not None:
        raise GraphPruneError("sparsity and budget exclude each other")
    if budget is not None and not at_once:
        raise GraphPruneError("budget: is met at once; use schedule='one-shot', or a sparsity to get there gradually")
    if prune_epochs is not None and at_once:
        raise GraphPruneError("prune_epochs: schedule='one-shot' prunes at once; choose another, such as 'cubic'")
    if prune_epochs is not None:
        check_integer("prune_epochs", prune_epochs, 1)
    return check_sparsity(0.5 if sparsity is None else sparsity), None if at_once else (prune_epochs or 5)


def _curve(name: str, amount: float, gradual: int | None) -> Callable[[int], float]:
    return make_schedule(name, 0.0, amount, gradual or 1)


def _by_name(options: Mapping[str, Any] | None, model: nn.Module) -> Mapping[str, Any] | None:
    """Options in which parts of the model are named: they mean the same in its copies, and can be told apart."""
    if not isinstance(options, Mapping):
        return options
    parts = [name for name in ("ignore", "parameters") if not isinstance(options.get(name), (str, type(None)))]
    table = NameTable.of(model) if parts else None
    return {**options, **{name: table.texts(options[name], name) for name in parts if table is not None}}


def _told(options: Mapping[str, Any] | None) -> str:
    """Options for comparison with a checkpoint's; of what is no plain value only the kind."""
    return json.dumps(dict(options or {}), sort_keys=True, default=lambda value: type(value).__name__)


def _folder(checkpoint: PathLike | None) -> Path | None:
    if checkpoint is None:
        return None
    try:
        return make_folder(checkpoint)
    except GraphPruneError as error:
        raise GraphPruneError(f"checkpoint: {error}") from error


def _objective(loss_fn: LossFunction | None, dense: nn.Module, distillation: Distillation | bool) -> Objective:
    if distillation is False:
        return Objective(loss_fn, None, None)
    if distillation is not True and not isinstance(distillation, Distillation):
        raise GraphPruneError(f"distillation: expected a bool or a Distillation, got {type(distillation).__name__}")
    return Objective(loss_fn, dense, None if distillation is True else distillation)


def _report(
    dense: nn.Module, tuning: Finetuning, pruner: GradualPruner, example_input: Any, evaluate: Any, speed: Any
) -> Report:
    scores: dict[str, float] = {}
    if evaluate is not None and tuning.before is not None:
        scores["before"] = tuning.before
        last = next((step.score for step in reversed(pruner.done) if step.score is not None), None)
        if last is not None:
            scores["after pruning"] = last
        if tuning.history and tuning.score is not None:
            scores["after recovery"] = tuning.score
    notes = []
    if len(pruner.done) > 1:
        notes.append(f"pruned in {len(pruner.done)} steps; 'after pruning' is right after the last of them")
    return report(
        dense, tuning.model, example_input, scores=scores, speed=speed, notes=notes,
        metric="score" if evaluate is None else metric_name(evaluate),
    )  # fmt: skip
