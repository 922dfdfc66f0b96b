"""Inputs made by gradient: noise that is changed until batch norms read what they have stored."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.activations import kept_bytes
from ..support.progress import stage
from ..tracing.example import ExampleInput
from .form import Form
from .noise import smooth
from .norms import mismatch
from .running import device_of, run_seen, seeded

# Activations that a batch may keep for its backward pass, in bytes, and samples that it has at most.
MEMORY = 2 << 30
MOST = 128
RATE = 0.3  # of Adam at first, in deviations of the noise; it falls along a cosine
# A batch is done when a tenth of the steps have brought less than this share of the mismatch, or little is left.
_GAIN, _CLOSE = 0.01, 1e-4
_TRIED = 16  # samples that the range of inputs is looked for with
_SCALES = tuple(10.0**k for k in (-2, -1, 0, 1, 2, 3))
_OFFSETS = (0.0, 2.0, -2.0)  # in deviations: about none, all or no numbers above 0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A batch. `before`, `after`: the mean divergence at batch norms, in nats, of noise and of what became of it."""

    tensors: tuple[Tensor, ...]
    before: float
    after: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Range:
    """Where the noise of an input lies: numbers of mean 0 and deviation 1 times `scale`, plus `offset`."""

    scale: float = 1.0
    offset: float = 0.0

    def of(self, noise: Tensor, like: Tensor) -> Tensor:
        """The input, in the type of the example's."""
        return (smooth(noise) * self.scale + self.offset).to(like.dtype)


class Fitting:
    """Makes batches for one model, whose form has free tensors, inside `model_at_rest`.

    Raises GraphPruneError, with the reason, where inputs cannot be made so.
    """

    def __init__(self, model: nn.Module, form: Form, seed: int) -> None:
        self.model, self.form, self.seed = model, form, seed
        self.device = device_of(model)
        self.batch_size, needed = self._most()
        self.places = self._reached()
        self._ranges = dict.fromkeys(self.places, Range())
        self._last = False  # whether images lie in memory channel after channel
        self._find_ranges()
        self.needed = needed

    def batch(self, number: int, samples: int, steps: int) -> Fitted:
        """The batch of that number; a function of it, of the seed and of the other arguments alone."""
        generator = seeded(self.seed, number)
        noise = {p: self._noise(p, samples, generator).requires_grad_() for p in self.places}
        optimizer = torch.optim.Adam(noise.values(), RATE)
        found: list[float] = []
        patience = max(10, steps // 10)
        with stage("matching batch norms", steps, "steps") as now:
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
                with torch.enable_grad():
                    error = self._mismatch(self._inputs(noise, samples))
                found.append(float(error.detach()))
                if not math.isfinite(found[-1]):
                    raise GraphPruneError(self._infinite)
                if _converged(found, patience):
                    break
                grads = torch.autograd.grad(error, list(noise.values()))
                for tensor, grad in zip(noise.values(), grads, strict=True):
                    tensor.grad = grad
                optimizer.step()
                now.tell(f"divergence {found[-1]:.2g}")
                now.advance()
        inputs = self._tensors(noise, samples)
        after = float(self._mismatch(self.form.filled(inputs)))
        return Fitted(tuple(t.detach().contiguous() for t in inputs), found[0], after, len(found))

    def _tensors(self, noise: dict[int, Tensor], samples: int) -> list[Tensor]:
        tensors = [t.to(self.device) for t in self.form.repeated(samples)]
        for place, values in noise.items():
            tensors[place] = self._ranges[place].of(values, tensors[place])
        return tensors

    def _inputs(self, noise: dict[int, Tensor], samples: int) -> ExampleInput:
        return self.form.filled([_laid_out(t, self._last) for t in self._tensors(noise, samples)])

    def _noise(self, place: int, samples: int, generator: torch.Generator) -> Tensor:
        like = self.form.tensors[place]
        kind = torch.promote_types(like.dtype, torch.float32)
        noise = torch.randn((samples, *like.shape[1:]), generator=generator, dtype=kind)
        return noise.to(self.device)

    def _mismatch(self, inputs: ExampleInput) -> Tensor:
        return mismatch(run_seen(self.model, inputs))

    def _most(self) -> tuple[int, int]:
        """How many samples a batch may have, and what it keeps then, in bytes."""
        own = self.form.batch_size
        tried = 8
        try:
            needed = self._kept_bytes(tried) / tried
        except GraphPruneError:
            if own == tried:
                raise
            return own, self._kept_bytes(own)
        most = max(1, min(MOST, int(MEMORY / max(needed, 1))))
        return most, int(most * needed)

    def _kept_bytes(self, samples: int) -> int:
        example = self._example(samples)
        return kept_bytes(self.model, lambda: run_seen(self.model, example))

    def _example(self, samples: int) -> ExampleInput:
        return self.form.filled([t.to(self.device) for t in self.form.repeated(samples)])

    def _reached(self) -> tuple[int, ...]:
        """Places of the free tensors that batch norms depend on."""
        tensors = [t.to(self.device) for t in self.form.tensors]
        for place in self.form.free:
            tensors[place] = tensors[place].detach().clone().requires_grad_()
        with torch.enable_grad():
            seen = run_seen(self.model, self.form.filled(tensors))
            if not seen:
                raise GraphPruneError(_NO_NORMS)
            error = mismatch(seen)
        wanted = [tensors[place] for place in self.form.free]
        grads = torch.autograd.grad(error, wanted, allow_unused=True) if error.requires_grad else [None] * len(wanted)
        places = tuple(p for p, grad in zip(self.form.free, grads, strict=True) if grad is not None)
        if not places:
            raise GraphPruneError(_NO_WAY)
        return places

    def _find_ranges(self) -> None:
        """The ranges of the inputs in which noise comes nearest, one input after the other; and how they best lie in
        memory."""
        samples = min(_TRIED, self.batch_size)
        generator = seeded(self.seed, 2**31)
        noise = {p: self._noise(p, samples, generator) for p in self.places}
        self._last = self._takes_channels_last(noise, samples)
        for place in self.places:
            errors: dict[Range, float] = {}
            for scale, offset in itertools.product(_SCALES, _OFFSETS):
                self._ranges[place] = Range(scale, offset * scale)
                error = float(self._mismatch(self._inputs(noise, samples)))
                errors[self._ranges[place]] = error if math.isfinite(error) else math.inf
            self._ranges[place] = best = min(errors, key=errors.__getitem__)
            if math.isinf(errors[best]):
                raise GraphPruneError(self._infinite)

    def _takes_channels_last(self, noise: dict[int, Tensor], samples: int) -> bool:
        """On CPUs, convolutions are several times as fast so; some code takes views that this does not allow."""
        if self.device.type != "cpu" or not any(t.dim() in (4, 5) for t in noise.values()):
            return False
        self._last = True
        try:
            self._mismatch(self._inputs(noise, samples))
        except GraphPruneError:
            return False
        return True

    @property
    def _infinite(self) -> str:
        return (
            "synthesize: what batch norms read, or what they store, is NaN or infinite on any noise; look at the "
            "weights and the running statistics of the model"
        )


_NO_NORMS = (
    "synthesize: inputs are made from the statistics that batch norms store (running_mean, running_var), and no batch "
    "norm of this model ran that stores any; token sequences are made for causal language models. Pass real inputs as "
    "data=: unlabelled ones, and a few hundred, are enough"
)
_NO_WAY = (
    "synthesize: no gradient leads from the batch norms to an input that can be changed: the inputs are integers or "
    "booleans, or the code runs without gradients (torch.no_grad, detach, rounding). Pass real inputs as data="
)


def _converged(found: Sequence[float], patience: int) -> bool:
    """Whether the latest steps have brought almost nothing."""
    if found[-1] < _CLOSE:
        return True
    return len(found) > 2 * patience and min(found[-patience:]) > (1 - _GAIN) * min(found[:-patience])


def _laid_out(tensor: Tensor, last: bool) -> Tensor:
    if last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if last and tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor
