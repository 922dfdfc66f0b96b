"""What latency is measured with: one runtime in one precision on this machine."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import nn

from ..profiles import Profile
from .kernels import Sample
from .meters import Reading


class Bench(abc.ABC):
    """The dense network on a rig, and its pruned candidates beside it. A context manager: files are gone at its end."""

    @abc.abstractmethod
    def profile(self) -> Profile:
        """The dense network's nodes, none where the runtime does not time them, and what a call of it takes as
        `compare` measures it."""

    @abc.abstractmethod
    def compare(self, small: nn.Module) -> tuple[float, float]:
        """Seconds of a call of the dense and of this network, by turns."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of files and sessions."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Rig(abc.ABC):
    """A context manager: at its end there are no processes left. `about`: what tells its tables from those of others,
    known inside."""

    about: Mapping[str, Any]

    @abc.abstractmethod
    def meter(self, samples: Sequence[Sample]) -> list[Reading]:
        """Of single computations, see `Meter`."""

    @abc.abstractmethod
    def chain_meter(self, kind: str, widths: Sequence[int]) -> list[float]:
        """Of chains, see `ChainMeter`."""

    @abc.abstractmethod
    def bench(self, model: nn.Module, example: Any) -> Bench:
        """Raises GraphPruneError where the model cannot be exported, or the runtime does not take it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
