"""Batches of any length in the form of an example input: which tensors count samples, and which can be made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..tracing.example import ExampleInput
from .made import unique_tensors


@dataclasses.dataclass(frozen=True)
class Form:
    """An example input whose tensors, each once and in order, are `tensors`.

    A tensor is `batched` where its first axis is as long as that of the first tensor. `free`: places of those that can
    be made: real or complex numbers, all finite, that count samples. All others stay the example's.
    """

    example: ExampleInput
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, example: ExampleInput) -> Form:
        found = unique_tensors(example)
        if not found:
            raise GraphPruneError("synthesize: example_input holds no tensor in tuples, lists or dicts to be made")
        return cls(example, tuple(found))

    @property
    def batch_size(self) -> int:
        """Samples of the example; 1 where it has no axis to count them."""
        return next((len(t) for t in self.tensors if t.dim()), 1)

    def batched(self, tensor: Tensor) -> bool:
        """Whether the first axis counts samples."""
        return tensor.dim() > 0 and len(tensor) == self.batch_size

    @property
    def free(self) -> tuple[int, ...]:
        """See the class."""
        return tuple(
            place
            for place, t in enumerate(self.tensors)
            if (t.is_floating_point() or t.is_complex()) and self.batched(t) and bool(t.isfinite().all())
        )

    def repeated(self, samples: int) -> list[Tensor]:
        """The example's tensors for so many samples: its own, from the first, again and again."""
        rows = torch.arange(samples) % max(self.batch_size, 1)
        return [t.detach()[rows.to(t.device)] if self.batched(t) else t.detach() for t in self.tensors]

    def filled(self, tensors: Sequence[Tensor]) -> ExampleInput:
        """The arguments with other tensors, one for each of `tensors`."""
        places = {id(t): new for t, new in zip(self.tensors, tensors, strict=True)}
        return self.example.map(_of(places))


def _of(places: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: places[id(tensor)]
