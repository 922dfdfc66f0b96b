"""What advice is based on: methods tried on the model itself, counted and compared with it."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...importance.calibration import CalibrationData, without_loss
from ...planning.calls import repaired
from ...planning.request import Request
from ...plans.surgery.copying import clone_with
from ...sparsity import magnitude, make_permanent, n_m, save
from ...support.progress import stage
from ...support.walking import named_tensors
from ...tracing.counting import count
from ...tracing.example import ExampleInput, result_tensors
from ...tracing.state import evaluating
from ...tracing.trace import run_model

# Batches that outputs are compared on: enough to see what is broken, few enough for a quick answer.
_BATCHES = 8
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Option:
    """One method, tried without training.

    `method`: "channels", "layers", "masks", "channels and masks" or "2:4 masks"; `amount`: ratio of channels, of layers
    that can be left out, or sparsity (both for both); `call`: the code that does it. `parameters`: how many times fewer
    are left that are not zero; `macs`: how many times fewer multiply-accumulates a dense runtime does; `bytes`: how
    many times smaller the file is (sparse format for masks). `speedup`: measured, None if not. `fidelity`: share
    of the variance of the model's outputs that is kept, 1 for all, 0 or less for none; None without outputs to compare.
    `score`: of `evaluate`, None without it.
    """

    method: str
    amount: tuple[float, ...]
    call: str
    parameters: float
    macs: float
    bytes: float
    speedup: float | None = None
    fidelity: float | None = None
    score: float | None = None


class Outputs:
    """The outputs of the model on a few batches, for comparison."""

    def __init__(self, model: nn.Module, example: ExampleInput, data: Any) -> None:
        batches = [(example.clone(), None)] if data is None else CalibrationData(data, example, model)
        self._inputs = [inputs for inputs, _ in itertools.islice(iter(batches), _BATCHES)]
        self._wanted = [_numbers(model, inputs) for inputs in self._inputs]
        self._total = _variation(self._wanted)

    def fidelity(self, model: nn.Module) -> float | None:
        """1 - sum of squared differences / sum of squared deviations from the mean; None if outputs do not vary.

        The mean is each output's own over the samples; with one sample, that of all its outputs."""
        if not self._total > 0:
            return None
        lost = 0.0
        for inputs, wanted in zip(self._inputs, self._wanted, strict=True):
            found = _numbers(model, inputs)
            if found.shape != wanted.shape:
                return None  # the number of results depends on the values (detections)
            lost += float((found - wanted).square().sum())
        return 1 - lost / self._total if lost == lost else None


def _numbers(model: nn.Module, inputs: ExampleInput) -> Tensor:
    """All outputs, one row per sample; in one row where they have no common first axis."""
    with evaluating(model):
        made = run_model(model, inputs.clone(), "advise")
        found = without_loss(result_tensors(made), made)
    numbers = [t.detach().double().cpu() for t in found if t.is_floating_point()]
    if numbers and all(t.dim() > 0 and len(t) == len(numbers[0]) for t in numbers):
        return torch.cat([t.reshape(len(t), -1) for t in numbers], 1)
    return torch.cat([t.flatten() for t in numbers] or [torch.zeros(0)]).reshape(1, -1)


def _variation(batches: list[Tensor]) -> float:
    same = len({b.shape[1] for b in batches}) == 1
    values = torch.cat(batches) if same else torch.cat([b.flatten() for b in batches]).reshape(1, -1)
    if not values.numel():
        return 0.0
    mean = values.mean(0) if len(values) > 1 else values.mean()
    return float((values - mean).square().sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """How methods are tried on `model`; networks that lost channels are repaired as `prune` does it by default."""

    model: nn.Module
    example: ExampleInput
    data: Any
    outputs: Outputs
    score: Callable[[nn.Module], float] | None

    def channels(self) -> Iterator[tuple[Option, nn.Module]]:
        """Structured pruning at every ratio that leaves less than the one before."""
        least = count(self.model, self.example).macs
        for ratio in RATIOS:
            made = self.cut(ratio)
            if made is None:
                continue
            small, call = made
            macs = count(small, self.example).macs
            if macs < least:
                yield self._option("channels", (ratio,), call, small, stored_bytes(small)), small
            least = min(least, macs)

    def layers(self) -> Iterator[tuple[Option, nn.Module]]:
        """Layers left out as a whole, at every ratio that takes one more."""
        taken = 0
        for ratio in RATIOS:
            request = Request(ratio, granularity="layer", data=self.data)
            with stage(f"layers, {ratio:g}"):
                decided = request.decide(self.model, self.example).plan
            if len(decided.layers) > taken:
                taken = len(decided.layers)
                small = decided.apply(self.model)
                given = "" if self.data is None else ", data=data"
                call = f'graphprune.prune(model, example_input, {ratio:g}, granularity="layer"{given})'
                yield self._option("layers", (ratio,), call, small, stored_bytes(small)), small

    def cut(self, ratio: float) -> tuple[nn.Module, str] | None:
        """A repaired network without that fraction of its channels; None if none can go."""
        criterion = None if self.data is None else "reconstruction"
        with stage(f"channels, {ratio:g}"):
            decided = Request(ratio, criterion=criterion, data=self.data).decide(self.model, self.example).plan
            if decided.empty:
                return None
            small = repaired(self.model, decided, decided.apply(self.model), self.example, self.data, "auto")
        told = "" if self.data is None else ', criterion="reconstruction", data=data'
        return small, f"graphprune.prune(model, example_input, {ratio:g}{told})"

    def masks(self) -> Iterator[Option]:
        """Unstructured pruning by magnitude, as a file."""
        for sparsity in SPARSITIES:
            masked = magnitude(_copied(self.model), sparsity)
            call = f"graphprune.sparsity.magnitude(model, {sparsity:g}); graphprune.sparsity.save(model, path)"
            with stage(f"masks, {sparsity:g}"):
                option = self._option("masks", (sparsity,), call, masked, sparse_bytes(masked))
            yield option

    def both(self, ratio: float) -> Iterator[Option]:
        """Masks in a network whose channels were pruned before."""
        made = self.cut(ratio)
        for sparsity in SPARSITIES[:3] if made is not None else ():
            assert made is not None
            masked = magnitude(_copied(made[0]), sparsity)
            call = f"small = {made[1]}; graphprune.sparsity.magnitude(small, {sparsity:g})"
            yield self._option("channels and masks", (ratio, sparsity), call, masked, sparse_bytes(masked))

    def two_of_four(self) -> Option:
        """Two of every four weights, for GPUs that compute with such."""
        masked = n_m(_copied(self.model), 2, 4)
        call = "graphprune.sparsity.n_m(model, 2, 4); graphprune.sparsity.semi_structured(model)"
        return self._option("2:4 masks", (0.5,), call, masked, sparse_bytes(masked))

    def _option(self, method: str, amount: tuple[float, ...], call: str, made: nn.Module, size: int) -> Option:
        before, after = count(self.model, self.example), count(made, self.example)
        plain = make_permanent(_copied(made)) if "masks" in method else made
        left = sum(int(p.count_nonzero()) for p in plain.parameters())
        return Option(
            method,
            amount,
            call,
            parameters=before.parameters / max(1, left),
            macs=before.macs / max(1, after.macs),
            bytes=stored_bytes(self.model) / max(1, size),
            fidelity=self.outputs.fidelity(plain),
            score=None if self.score is None else self.score(plain),
        )


def _copied(model: nn.Module) -> nn.Module:
    return clone_with(model, {})


def stored_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in named_tensors(model).values()}.values())


def sparse_bytes(model: nn.Module) -> int:
    """Size of the file that `graphprune.sparsity.save` writes."""
    with tempfile.TemporaryDirectory(prefix="graphprune.") as folder:
        return save(model, Path(folder) / "model.gps").stat().st_size


def check_real(model: nn.Module) -> None:
    """Raise GraphPruneError for a model without values."""
    if any(t.is_meta for t in named_tensors(model).values()):
        raise GraphPruneError("advise: the model is on the meta device and has no values; load its weights first")
