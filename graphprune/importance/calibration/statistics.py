"""Second moments of what the layers of a network read, made when asked for and dropped when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ...support.walking import named_tensors
from ...tracing.trace import Trace
from ...tracing.work import macs_of
from .data import CalibrationData
from .layers import Reader, find_readers
from .moments import Moments, rows_of
from .observe import observe, refuse_infinite_call

_T = TypeVar("_T")
# Moments held at a time.
MEMORY = 1 << 30
# Layers with more inputs than this (a flattened image) would need gigabytes for their moments.
MAX_FEATURES = 12_000


class Calibration:
    """What `data` say about `model`, a network with the parameter names of the user's (batch norms folded).

    `loss_fn(output, targets)` returns a scalar, None for what is usual (`batch_loss`); only criteria that need a loss
    use it.
    """

    def __init__(self, model: nn.Module, trace: Trace, data: CalibrationData, loss_fn: Any = None) -> None:
        self.model, self.data, self.loss_fn = model, data, loss_fn
        self.macs_per_sample = _macs_per_sample(trace)
        self.readers: dict[str, Reader] = {r.weight: r for r in find_readers(trace)}
        self.weights = named_tensors(model)
        self._held: dict[str, Moments] = {}
        self._made: dict[Callable[..., Any], Any] = {}

    def cached(self, make: Callable[[Calibration], _T]) -> _T:
        """`make(self)`, computed once."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[no-any-return]

    def measurable(self, weight: str) -> bool:
        """Second moments of what this layer reads can be had."""
        reader = self.readers.get(weight)
        return reader is not None and reader.separable and self._features(reader) <= MAX_FEATURES

    def moments(self, weights: Iterable[str]) -> list[Moments]:
        """Moments of the inputs of these layers, without targets, in float64.

        One pass over the data serves as many of the following layers as memory allows.
        """
        wanted = list(weights)
        if any(name not in self._held for name in wanted):
            self._held = self._gather(self._load(wanted))
        return [self._held[name] for name in wanted]

    def _features(self, reader: Reader) -> int:
        weight = self.weights[reader.weight]
        return weight.numel() // weight.shape[reader.out_axis]

    def _load(self, wanted: Sequence[str]) -> list[Reader]:
        """The wanted readers, and those after them while they fit."""
        chosen = [self.readers[name] for name in wanted]
        used = sum(self._bytes(r) for r in chosen)
        first = min(r.order for r in chosen)
        for reader in self.readers.values():
            if reader.order > first and reader not in chosen and self.measurable(reader.weight):
                used += self._bytes(reader)
                if used > MEMORY:
                    break
                chosen.append(reader)
        return chosen

    def _bytes(self, reader: Reader) -> int:
        return Moments.bytes_needed(reader.groups, self._features(reader), 0)

    def _gather(self, readers: Sequence[Reader]) -> dict[str, Moments]:
        device = next((t.device for t in self.weights.values()), torch.device("cpu"))
        out = {r.weight: Moments(r.groups, self._features(r), 0, device) for r in readers}
        seen = 0
        for index, example in enumerate(self.data.inputs()):
            calls = observe(self.model, readers, example, inputs=True)
            for reader in readers:
                for call in calls[reader.weight]:
                    assert call.x is not None
                    refuse_infinite_call(reader, call, index)
                    x, y = rows_of(reader, call, None, self.weights[reader.weight], seen)
                    out[reader.weight].add(x, y)
            seen += example.samples
        return out


def _macs_per_sample(trace: Trace) -> float:
    """Right where the first axis of the first input is the batch."""
    inputs = (node.meta["val"].shape for node in trace.graph.nodes if node.op == "placeholder" and "val" in node.meta)
    samples = next((shape[0] for shape in inputs if shape), 1)
    return sum(macs_of(node) or 0 for node in trace.graph.nodes) / max(samples, 1)
