"""The fit: the pruned network's parameters go down the error of its blocks and outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....importance.calibration import without_loss
from ....support.activations import kept_bytes
from ....support.interrupts import from_signal
from ....support.progress import Stage, stage
from ....support.randomness import random_state_kept, seed_epoch
from ....tracing.example import ExampleInput, result_tensors
from ....tracing.state import evaluating, unfused
from ....tracing.trace import run_model
from ...training.loop import rate_factor
from ..decisions import choice_axis
from ..walk import Inputs
from .augmenting import augmented
from .places import Place, Watch
from .samples import chosen, separable, shuffled
from .settings import BlockFit
from .weights import Weights, own_parameters

WARMUP = 0.05
# Activations that a backward pass may keep: larger batches are gone through in parts.
ACTIVATIONS = 2 << 30
# Samples that the spread of the dense network's blocks and outputs is measured on.
_MEASURED = 512


@dataclasses.dataclass(frozen=True)
class Fitted:
    """`before`, `after`: what the fit goes down, in the first and in the last pass over the data; NaN where there is
    nothing to fit. `failed`: why there is nothing to be kept, "" where there is something. `places`: how many blocks
    were compared."""

    before: float
    after: float
    places: int
    failed: str = ""


class Failed(Exception):
    """There are no gradients to go down."""


class Spread:
    """The variance of tensors around the means of their channels."""

    def __init__(self) -> None:
        self._rows, self._sums = 0, torch.zeros(2, 1, dtype=torch.float64)

    def add(self, made: Tensor, axis: int) -> None:
        rows = made.detach().movedim(axis, -1).flatten(0, -2).double()
        rows = torch.where(rows.isfinite(), rows, 0.0)
        self._sums = self._sums.to(rows.device) + torch.stack([rows.sum(0), rows.square().sum(0)])
        self._rows += len(rows)

    @property
    def variance(self) -> float:
        """The mean over channels; of what is constant the mean square."""
        mean, square = self._sums / max(self._rows, 1)
        found = float((square - mean.square()).clamp_min(0).mean())
        return found if found > 1e-12 * float(square.mean()) else float(square.mean())


def fit_blocks(
    dense: nn.Module,
    small: nn.Module,
    places: Sequence[Place],
    data: Inputs,
    loader: Any,
    options: BlockFit,
    left: Collection[str] = (),
) -> Fitted:
    """Fit the parameters of `small`, but those called as in `left`, in place. `loader`: what `data` reads, whose random
    choices are made a function of the seed and the pass."""
    with random_state_kept(loader):
        return _Fit(dense, small, places, data, loader, options, left).run()


class _Fit:
    def __init__(
        self,
        dense: nn.Module,
        small: nn.Module,
        places: Sequence[Place],
        data: Inputs,
        loader: Any,
        options: BlockFit,
        left: Collection[str],
    ) -> None:
        self.dense, self.small, self.data, self.loader, self.options = dense, small, data, loader, options
        self.parameters = own_parameters(small, left)
        self.samples, self.reached = 0, False
        self.rooms: dict[tuple[torch.Size, ...], int] = {}
        self.spreads: dict[str, float] = {}
        self.places = list(places)
        self._measure()

    def run(self) -> Fitted:
        if not self.parameters or not self.samples:
            return Fitted(math.nan, math.nan, len(self.places), "there is nothing to fit")
        rounds = self._rounds()
        total = self.options.passes * self.samples * len(rounds)
        errors: list[float] = []
        failed = ""
        try:
            with stage("fitting blocks", total, "samples") as now:
                for places, parameters, outputs in rounds:
                    weights = Weights(parameters, self.options.lr)
                    with weights.alone(self.small):
                        for number in range(self.options.passes):
                            errors.append(self._pass(number, weights, places, outputs, now))
            if not self.reached:
                raise Failed("no gradients come to the parameters; look for torch.no_grad or detach in forward")
        except Failed as error:
            failed = str(error)
        return Fitted(errors[0] if errors else math.nan, errors[-1] if errors else math.nan, len(self.places), failed)

    def _rounds(self) -> list[tuple[list[Place], dict[str, nn.Parameter], bool]]:
        """What is fitted at a time: the places that count, the parameters, and whether the outputs count."""
        if self.options.together:
            return [(self.places, self.parameters, True)]
        rounds: list[tuple[list[Place], dict[str, nn.Parameter], bool]] = []
        done: set[str] = set()
        for place in self.places:
            own = {n: p for n, p in self.parameters.items() if n in place.after and n not in done}
            done |= own.keys()
            if own:
                rounds.append(([place], own, False))
        rest = {n: p for n, p in self.parameters.items() if n not in done}
        return [*rounds, ([], rest, True)] if rest else rounds

    def _pass(
        self, number: int, weights: Weights, places: Sequence[Place], outputs: bool, now: Stage
    ) -> float:
        """One pass over the data; the mean loss."""
        seen, total, whole = 0, 0.0, self.options.passes * self.samples
        for example in (augmented(batch, self.options.augment) for batch in self._batches(number)):
            weights.forget()
            for piece in self._pieces(example):
                loss = self._loss(piece, places, outputs)
                total += float(loss.detach()) * piece.samples
                if loss.requires_grad:
                    _go_back(loss, piece.samples / example.samples)
                    self.reached = True
            if not math.isfinite(total):
                raise Failed(f"the error was not finite in pass {number + 1}; lower lr")
            weights.step(rate_factor(min(number * self.samples + seen, whole - 1), whole, WARMUP))
            seen += example.samples
            now.advance(example.samples)
        now.tell(f"pass {number + 1}, error {total / max(seen, 1):.2e}")
        return total / max(seen, 1)

    def _pieces(self, example: ExampleInput) -> Iterator[ExampleInput]:
        """A batch in parts that the memory has room for; the mean over all is that over the parts, by their samples."""
        part = self._room(example) if separable(example) else example.samples
        if part >= example.samples:
            yield example
            return
        for start in range(0, example.samples, part):
            yield chosen(example, range(start, min(start + part, example.samples)))

    def _room(self, example: ExampleInput) -> int:
        """How many samples of this size a backward pass has room for, at least one."""
        size = tuple(tensor.shape[1:] for tensor in example.tensors())
        if size not in self.rooms:
            one = chosen(example, range(1))
            kept = kept_bytes(self.small, lambda: _made(self.small, (), one, gradients=True))
            self.rooms[size] = max(1, ACTIVATIONS // max(kept, 1))
        return self.rooms[size]

    def _batches(self, number: int) -> Iterator[ExampleInput]:
        """The samples in the order of this pass."""
        seed_epoch(self.options.seed, number, self.loader)
        order = torch.Generator().manual_seed(torch.initial_seed() & ((1 << 63) - 1))
        return shuffled(self.data.inputs(), self.options.batch_size, order)

    def _loss(self, example: ExampleInput, places: Sequence[Place], outputs: bool) -> Tensor:
        wanted, answers = _made(self.dense, places, example)
        with torch.enable_grad():
            found, own = _made(self.small, places, example, gradients=True)
            terms = [
                _distance(a, place.wanted(b), self.spreads[place.weight])
                for place in places
                for a, b in zip(found.get(place.weight, ()), wanted.get(place.weight, ()), strict=False)
            ]
            loss = sum(terms, torch.zeros(())) / max(len(terms), 1)
            if outputs:
                ends = [
                    _distance(a, b, self.spreads[f"output {i}"])
                    for i, (a, b) in enumerate(zip(own, answers, strict=False))
                ]
                loss = loss + self.options.outputs * sum(ends, torch.zeros(())) / max(len(ends), 1)
        return loss

    def _measure(self) -> None:
        """The spreads, how many samples there are, and which places can be compared."""
        spreads: dict[str, Spread] = {}
        shapes: dict[str, bool] = {}
        for number, example in enumerate(self._batches(0)):
            if self.samples < _MEASURED:
                wanted, answers = _made(self.dense, self.places, example)
                for place in self.places:
                    for made in wanted.get(place.weight, ()):
                        spreads.setdefault(place.weight, Spread()).add(place.wanted(made), made.dim() + place.axis)
                for i, answer in enumerate(answers):
                    spreads.setdefault(f"output {i}", Spread()).add(answer, choice_axis(answer))
                if not number:
                    shapes = _alike(_made(self.small, self.places, example)[0], wanted, self.places)
            self.samples += example.samples
        self.spreads = {name: spread.variance for name, spread in spreads.items()}
        self.places = [p for p in self.places if shapes.get(p.weight) and self.spreads.get(p.weight, 0) > 0]


def _go_back(loss: Tensor, share: float) -> None:
    """Add the gradients of `share` times the loss."""
    try:
        loss.backward(torch.full_like(loss, share))
    except RuntimeError as error:
        if from_signal(error):
            raise
        raise Failed(f"gradients cannot be computed: {str(error).splitlines()[0]}") from error


def _alike(
    found: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]], places: Sequence[Place]
) -> dict[str, bool]:
    """Which places the two networks come to equally often, with tensors of the same shapes."""
    return {
        p.weight: [t.shape for t in found.get(p.weight, ())] == [p.wanted(t).shape for t in wanted.get(p.weight, ())]
        for p in places
    }


def _made(
    net: nn.Module, places: Sequence[Place], example: ExampleInput, gradients: bool = False
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """What a network makes at the places, and its answers."""
    with evaluating(net), torch.set_grad_enabled(gradients), unfused():
        with Watch(net, places) as watch:
            out = run_model(net, example.clone(), "data")
        answers = without_loss(result_tensors(out), out)
    return watch.made, [t for t in answers if t.is_floating_point()]


def _distance(found: Tensor, wanted: Tensor, spread: float) -> Tensor:
    """Mean square of the difference, divided by `spread`; 0 where there is nothing to compare."""
    if found.shape != wanted.shape or not spread or not found.numel():
        return torch.zeros((), device=found.device)
    a, b = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (found, wanted.detach()))
    return torch.where(b.isfinite(), a - b, 0.0).square().mean() / spread
