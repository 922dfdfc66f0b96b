"""`finetune`: give a pruned network its accuracy back by training it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...support.doors import door
from ...support.progress import ProgressOption, reported
from ...support.randomness import random_state_kept
from ...support.types import LossFunction, PathLike
from .distillation import Distillation
from .evaluation import evaluator
from .loop import MakeOptimizer, Training
from .objective import Objective
from .penalties import Regularize
from .runs import Epoch, Finetuning, Run


@door("model", keep_wrapper=True)
@reported("fine-tuning")
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
    regularize: Regularize = None,
    evaluate: Any = None,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    progress: ProgressOption = None,
    on_epoch: Callable[[Epoch, nn.Module], None] | None = None,
) -> Finetuning:
    """Train a copy of `model`; the model itself is not touched. A plain loop: use your own trainer if you have one.

    - `data`: a DataLoader or list of batches (inputs, targets), read once an epoch. Inputs are a tensor, a tuple of
      positional arguments, or a dict of keyword arguments. Batches go to the model's device.
    - `epochs`: how many. `loss_fn(output, targets)`: a scalar; default cross-entropy of logits and class numbers, or,
      without targets, the loss that the model returns itself (`output.loss`). For batches that are dicts without
      targets it gets the dict. It may hold weights, which are trained
      in place where your own optimizer has them too, buffers and counters.
    - `optimizer`: "sgd" (Nesterov, with `momentum`), "adam", "adamw", or a function (model) -> torch optimizer with its
      own options; one whose `step` asks for a closure, as LBFGS does, is given one, which runs the batch anew. `lr`:
      peak learning rate, default 0.02 for "sgd", 0.001 for the others. `weight_decay`: 5e-4.
    - The rate rises linearly over the fraction `warmup` of all steps and falls to zero along half a cosine. `clip`:
      largest norm of all gradients together (default 5), None for no clipping.
    - `amp`: "auto" (default) for mixed precision on GPUs (bfloat16, or float16 with loss scaling where the GPU has no
      bfloat16), True for it everywhere, False for none.
    - `teacher`: a network to learn from, usually the dense one, faster with `graphprune.fold_conv_bn`; `distillation`:
      how, see `Distillation`. With a teacher data need no targets.
    - `regularize`: train a network that is to be pruned afterwards: "lasso" or "growing", which drive its weak channels
      to zero, for the inputs of the first batch and with the weights that `GroupLasso` and `GrowingPenalty` have
      without arguments ("growing" reaches its own after half of the steps); or one of these for `model`, which itself
      stays as it is. Their gradients are added after clipping.
    - `evaluate`: a function (model) -> number, higher is better, or data (inputs, targets) for top-1 accuracy; see
      `Evaluation` for other metrics. It is asked before and after every epoch. `patience`: stop after this many epochs
      in a row without a better score, and return the best weights instead of the last.
    - `seed`: all randomness of an epoch (order of batches, dropout, augmentation drawn from torch, numpy or python's
      random) follows from the seed and the epoch's number alone. On one machine the same call gives the same
      weights, bit for bit, as far as torch's operators are deterministic on the device.
    - `checkpoint`: a file (safetensors) that is written after every epoch and read first where it exists: a run that
      was stopped at any moment goes on with the epoch that was under way and ends with the same weights. `epochs` and
      the other numbers must be the same. Stored too: what else the optimizer trains; tensors of the loss, and what has
      changed of its other data: numbers, texts, arrays, generators of random numbers, and containers of these, in its
      modules, the object or the functions themselves, and in objects that these lead to. A GraphPruneWarning names what
      cannot be stored. Not stored: what the model's code keeps beside parameters and buffers, and where loaders stand
      that have random numbers or counters of their own (those of torch's loaders follow from the epoch).
    - `on_epoch(epoch, model)`: called after every epoch. `progress`: as in `graphprune.plan`.

    Masks of `graphprune.sparsity` stay in force. `torch.no_grad` and `torch.inference_mode` around the call change
    nothing.

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
    run = Run(model, data, options, objective, evaluator(evaluate), patience, checkpoint, on_epoch,
              regularize=regularize)  # fmt: skip
    with random_state_kept(data):
        return run.finish("training")
