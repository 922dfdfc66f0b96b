"""`synthesize`: inputs made from nothing but the network, and `Synthetic`: such inputs where data are asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.doors import door
from ..support.numbers import check_integer
from ..support.progress import ProgressOption, reported, stage
from ..support.types import PathLike
from ..tracing.example import ExampleInput
from .files import Store, fingerprint
from .fitting import Fitting
from .form import Form
from .made import Batch, SyntheticInputs
from .running import check_values, differentiable, model_at_rest
from .tokens import MOST as MOST_SEQUENCES
from .tokens import speaker_of


@door("model", exact=True)
@reported("making inputs")
def synthesize(
    model: nn.Module,
    example_input: Any,
    n: int = 512,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    path: PathLike | None = None,
    progress: ProgressOption = None,
) -> SyntheticInputs:
    """`n` inputs that are made from `model` alone, for criteria and repairs that need data where there are none.

    Batch norms have stored mean and variance of every channel of what they read in training. Noise is changed by the
    gradient, batch after batch, until what the batch norms read has these means and variances (DeepInversion, Yin et
    al., CVPR 2020; ZeroQ, Cai et al., CVPR 2020), all of them weighted alike. That is done for every tensor of
    `example_input` of real or complex numbers whose first axis counts samples, of any shape, in tuples, lists and dicts
    too; where its noise lies (pixels from 0 to 255, say) is found out first. Other tensors, those that hold infinite
    numbers, and those that no batch norm depends on stay those of the example, repeated.

    Causal language models are asked for sequences of tokens as long as the example's: the first drawn from all, each
    other one as likely as the model says after those before (as in LLM-QAT, Liu et al., 2023); a forward pass for each.

    - `n`: inputs in all. `steps`: of Adam for a batch, at most; a batch that comes no nearer is done.
    - `batch_size`: by default 128 (32 sequences), fewer where the activations that a batch keeps for its backward pass
      would need more than 2 GiB, which is most of the memory it takes; that of the example where the model takes no
      other. The statistics are those of a batch, so it should not be a few only.
    - `seed`: what is drawn depends on it, on nothing else, and on the number of the batch.
    - `path`: a safetensors file that is written after every batch and read first: a run that was stopped goes on, one
      that is done is read. A file of another model, of other weights or other arguments is refused.
    - `progress`: None for a bar on a terminal, True, False, or a function, called with a `graphprune.Progress`.

    `model` runs in eval mode and is afterwards as before, with buffers, gradients and flags, as is all random state.
    Time and memory are those of training with as many batches times steps, without gradients of weights.

    Raises GraphPruneError for arguments out of range, for files of others, for errors of the model, and with the reason
    where inputs cannot be made: no batch norm stores anything, or inputs are integers and the model no causal language
    model.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> made = graphprune.synthesize(net, torch.randn(1, 3, 8, 8), n=20, steps=30)
    >>> made[0].shape, made.after < made.before
    (torch.Size([20, 3, 8, 8]), True)
    """
    checked = Synthetic(n, steps, seed, batch_size, path)
    check_values(model)
    example = ExampleInput.of(example_input)
    form = Form.of(example)
    begun = time.perf_counter()
    model = differentiable(model)
    with model_at_rest(model):
        place, size, make = _maker(model, form, checked)
        size = min(size, n) if batch_size is None else batch_size
        lengths = [min(size, n - first) for first in range(0, n, size)]
        settings = {"model": fingerprint(model, form), "n": n, "steps": steps, "seed": seed, "batch_size": size}
        store = Store(path, settings, form)
        batches = store.read(lengths)
        with stage("batches", len(lengths), "batches") as now:
            now.advance(len(batches))
            for number in range(len(batches), len(lengths)):
                batches.append(make(number, lengths[number]))
                store.write(batches)
                now.advance()
    return SyntheticInputs(batches, n, place, _kind(example), time.perf_counter() - begun)


def _maker(model: nn.Module, form: Form, asked: Synthetic) -> tuple[int, int, Callable[[int, int], Batch]]:
    """The place of the first made tensor, the samples of a batch, and what makes a batch of a number and length."""
    speaker = "" if not any(not t.is_floating_point() for t in form.tensors) else speaker_of(model, form)
    if not isinstance(speaker, str):

        def said(number: int, samples: int) -> Batch:
            tensors = speaker.batch(asked.seed, number, samples)
            placed = [new.to(old.device) for new, old in zip(tensors, form.tensors, strict=True)]
            return Batch(form.filled(placed), float("nan"), float("nan"), 0)

        return speaker.place, MOST_SEQUENCES, said
    if not form.free:
        raise GraphPruneError(
            f"synthesize: the inputs are integers or booleans, for which there is no gradient, and the model is not "
            f"asked for sequences of tokens: {speaker}. Pass real inputs as data="
        )
    fitting = Fitting(model, form, asked.seed)

    def fitted(number: int, samples: int) -> Batch:
        found = fitting.batch(number, samples, asked.steps)
        placed = [new.to(old.device) for new, old in zip(found.tensors, form.tensors, strict=True)]
        return Batch(form.filled(placed), found.before, found.after, found.steps)

    return fitting.places[0], fitting.batch_size, fitted


def _kind(example: ExampleInput) -> str:
    if example.kwargs:
        return "dict"
    return "tensor" if len(example.args) == 1 and isinstance(example.args[0], Tensor) else "tuple"


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Stands for inputs that are made from the network itself, wherever `data` are taken:
    `graphprune.prune(model, x, 0.5, criterion="reconstruction", data=graphprune.Synthetic(n=512))`.

    The arguments are those of `synthesize`. The inputs are made when they are first needed, kept in this object, and
    made anew for a model of other weights or another example input; the latest two are kept.
    """

    n: int = 512
    steps: int = 100
    seed: int = 0
    batch_size: int | None = None
    path: PathLike | None = None
    _made: dict[str, SyntheticInputs] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("steps", 1), ("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            value = int(value) if isinstance(value, np.integer) else value
            check_integer(name, value, least)
            object.__setattr__(self, name, value)

    @door("model", exact=True)
    def inputs(self, model: nn.Module, example_input: Any, progress: ProgressOption = None) -> SyntheticInputs:
        """Those of this model as it is now."""
        key = fingerprint(model, Form.of(ExampleInput.of(example_input)))
        if key not in self._made:
            made = synthesize(
                model, example_input, self.n, steps=self.steps, seed=self.seed, batch_size=self.batch_size,
                path=self.path, progress=progress,
            )  # fmt: skip
            while len(self._made) > 1:
                self._made.pop(next(iter(self._made)))
            self._made[key] = made
        return self._made[key]


def made_for(data: Any, model: nn.Module, example_input: Any) -> Any:
    """`data`, or the inputs that a `Synthetic` stands for, of this model."""
    return data.inputs(model, example_input) if isinstance(data, Synthetic) else data
