"""The inputs that were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..tracing.example import ExampleInput


@dataclasses.dataclass(frozen=True)
class Batch:
    """`inputs`: the arguments of one call. `before`, `after`: how far the statistics at batch norms were from those
    stored, of noise and of the inputs (see `SyntheticInputs`); NaN for sequences of tokens. `steps`: of gradient."""

    inputs: ExampleInput
    before: float
    after: float
    steps: int


class SyntheticInputs(Sequence[Any]):
    """Inputs that `synthesize` made: a list of batches, each what the model is called with, in the form of the example
    input; taken as `data=` wherever data are.

    `batches`: the same with figures. `samples`: how many inputs there are in all. `before`, `after`: the mean over
    batch norms and channels of the divergence of what they read from what they store, as normal distributions, in nats,
    for noise and for the inputs. `seconds`: what the call took.
    """

    def __init__(self, batches: Sequence[Batch], samples: int, place: int, form: str, seconds: float = 0.0) -> None:
        """`place`: of the first made tensor among those of a batch; `form`: "tensor", "tuple" or "dict"."""
        self.batches, self.samples, self.seconds = tuple(batches), samples, seconds
        self._place, self._form = place, form

    @property
    def before(self) -> float:
        """See the class."""
        return _mean([batch.before for batch in self.batches])

    @property
    def after(self) -> float:
        """See the class."""
        return _mean([batch.after for batch in self.batches])

    @property
    def examples(self) -> tuple[ExampleInput, ...]:
        """The arguments of each batch."""
        return tuple(batch.inputs for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._as_given(example) for example in self.examples[index]]
        return self._as_given(self.examples[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._as_given, self.examples)

    def _as_given(self, example: ExampleInput) -> Any:
        if self._form == "dict":
            return dict(example.kwargs)
        return example.args[0] if self._form == "tensor" else example.args

    def images(self) -> Tensor:
        """The first of the made inputs as pictures, (samples, channels, height, width) between 0 and 1: each channel
        from its 1st to its 99th percentile. `torchvision.utils.save_image(made.images()[:64], "made.png")` shows them.

        Raises GraphPruneError where its samples have no two axes to be seen.
        """
        parts = [unique_tensors(example)[self._place] for example in self.examples]
        found = torch.cat([part.detach().float().cpu() for part in parts if not part.is_complex()])
        if found.dim() == 3:
            found = found[:, None]
        if not found.numel() or found.dim() != 4:
            shape = tuple(parts[0].shape)
            raise GraphPruneError(f"images: inputs of shape {shape} are no pictures; look at the tensors themselves")
        rows = found.movedim(1, 0).flatten(1)
        some = rows[:, :: max(1, rows.shape[1] // 2**20)]
        low, high = (torch.quantile(some, q, 1).view(1, -1, 1, 1) for q in (0.01, 0.99))
        return ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)

    def __repr__(self) -> str:
        return f"SyntheticInputs(samples={self.samples}, batches={len(self)})"

    def __str__(self) -> str:
        text = f"{self.samples} inputs in {len(self)} batches, {self.seconds:.0f} s"
        if self.after == self.after:
            steps = max(batch.steps for batch in self.batches)
            text += f", {steps} steps; divergence at batch norms {self.before:.2g} -> {self.after:.2g}"
        return text


def unique_tensors(example: ExampleInput) -> list[Tensor]:
    """Every tensor in tuples, lists and dicts once, in order."""
    found: dict[int, Tensor] = {}
    example.map(lambda t: found.setdefault(id(t), t))
    return list(found.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
