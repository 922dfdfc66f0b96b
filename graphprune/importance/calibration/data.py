"""Batches: whatever the user's loader yields, as arguments of one call and, if there are any, targets.

Everything that takes data reads them here: criteria, repair, training, evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.progress import watched
from ...support.randomness import Repeated
from ...synthesis import Synthetic, SyntheticInputs
from ...tracing.example import ExampleInput, flatten_tensors, ordinary

# What data are read by where no example says how many positional arguments the model takes.
ONE_INPUT = ExampleInput((None,), {})
# Length of the batches a plain tensor is cut into.
_BATCH = 64


class CalibrationData:
    """Batches that can be read more than once, on the model's device.

    `data`: a DataLoader, a list, what `synthesize` made or any other object that can be iterated repeatedly; or a
    single tensor, which is read in batches of 64. Each item is what the model is called with - a tensor, a dict of
    keyword arguments, or a tuple of as many positional arguments as `example` has - or a pair (inputs, targets) of that
    and anything. `once`: a generator will do.

    Raises GraphPruneError, naming `data`, for what cannot be iterated, can be iterated only once, is empty, or yields
    something else.
    """

    def __init__(self, data: Any, example: ExampleInput, model: nn.Module, once: bool = False) -> None:
        if isinstance(data, Synthetic):
            raise GraphPruneError(
                "data: Synthetic stands for inputs without targets, made for the choice of channels and for repairs; "
                "here pass real data"
            )
        if isinstance(data, SyntheticInputs):
            data = data.examples
        if isinstance(data, Tensor):
            data = list(data.split(_BATCH)) if data.dim() else data
        if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable) or not _iterable(data):
            raise GraphPruneError(
                f"data: expected a DataLoader, a list of batches or another iterable of inputs, got "
                f"{type(data).__name__}"
            )
        if isinstance(data, Iterator) and not once:
            raise GraphPruneError(
                f"data: got a {type(data).__name__}, which can be read only once; several passes are made, so pass a "
                f"DataLoader or a list of batches"
            )
        self._data = data
        self._found: int | None = None  # batches of the first whole pass
        self._positional = len(example.args)
        self._device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def __iter__(self) -> Iterator[tuple[ExampleInput, Any]]:
        """Pairs of arguments and targets (None without); whoever listens to progress is told of each."""
        return watched(self.silently(), "data", self.length, "batches")

    def silently(self) -> Iterator[tuple[ExampleInput, Any]]:
        """The same pairs, where something else is counted."""
        number = 0
        for index, item in enumerate(self._data):
            number = index + 1
            inputs, targets = self._parts(item, index)
            for tensor in inputs.tensors():
                refuse_infinite(tensor, f"batch {index} holds", nan_alone=True)
            if inputs.tensors() and not any(t.numel() for t in inputs.tensors()):
                raise GraphPruneError(f"data: batch {index} holds no samples; leave it out, or look at how it is read")
            yield inputs.to(self._device), _to(targets, self._device)
        if self._found and not number:
            raise GraphPruneError(
                f"data: yields no batch when it is read again, after {self._found} the first time; several passes are "
                f"made, so pass a DataLoader or a list of batches"
            )
        if not number:
            raise GraphPruneError("data: yields no batch; pass at least one")
        self._found = self._found or number

    def repeating(self) -> CalibrationData:
        """The same data, of which every pass is the first one again, whatever is shuffled or drawn on the way."""
        made = copy.copy(self)
        made._data = self._data if isinstance(self._data, (list, tuple)) else Repeated(self._data)
        return made

    @property
    def length(self) -> int | None:
        """How many batches there are; None where the data do not say."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except Exception:  # whatever a user's object says of a length that it does not know
            return None

    def head(self, samples: int) -> list[Any]:
        """The first items, as they were given, that hold at least this many samples; all if there are fewer."""
        out: list[Any] = []
        seen = 0
        for index, item in enumerate(self._data):
            out.append(item)
            seen += self._parts(item, index)[0].samples
            if seen >= samples:
                break
        return out

    def inputs(self) -> Iterator[ExampleInput]:
        """The arguments alone."""
        return (inputs for inputs, _ in self)

    def _parts(self, item: Any, index: int) -> tuple[ExampleInput, Any]:
        if isinstance(item, (Tensor, Mapping, ExampleInput)):
            return _example(item, index), None
        if isinstance(item, (tuple, list)) and item:
            nested = isinstance(item[0], (tuple, list, Mapping))
            if len(item) == self._positional and not (nested and len(item) == 2):
                return _example(tuple(item), index), None
            if len(item) == 1:
                return _example(item[0], index), None
            if len(item) == 2:
                return _example(item[0], index), item[1]
        raise GraphPruneError(
            f"data: batch {index} is a {type(item).__name__}{_length(item)}; expected inputs (a tensor, a dict of "
            f"keyword arguments, a tuple of {self._positional} positional arguments) or a pair (inputs, targets)"
        )


def refuse_infinite(values: Tensor, what: str, nan_alone: bool = False) -> None:
    """Raise GraphPruneError where values are NaN or infinite. `nan_alone`: infinite ones may be meant, as in a mask."""
    if not (values.is_floating_point() or values.is_complex()) or values.is_meta:
        return
    if bool(values.sum().isfinite()):  # one pass where all is well: what is not finite is so in sums too
        return
    wrong = values.isnan() if nan_alone else ~values.isfinite()
    count = int(wrong.sum())
    if count:
        kind = "NaN" if nan_alone else "NaN or infinite values"
        raise GraphPruneError(
            f"data: {what} {count} {kind} in {values.numel()} numbers of shape {tuple(values.shape)}: nothing can be "
            f"learnt from that; leave these samples out, or look at how they are read"
        )


def _example(value: Any, index: int) -> ExampleInput:
    try:
        return ExampleInput.of(value)
    except GraphPruneError as error:
        raise GraphPruneError(f"data: batch {index}: {str(error).replace('example_input', 'inputs')}") from error


def _iterable(data: Any) -> bool:
    return not (isinstance(data, Tensor) and data.dim() == 0)


def _length(item: Any) -> str:
    return f" of length {len(item)}" if isinstance(item, (tuple, list)) else ""


def _to(value: Any, device: torch.device) -> Any:
    tensors = flatten_tensors(value)
    if not tensors or all(t.device == device and ordinary(t) is t for t in tensors):
        return value
    return ExampleInput((value,), {}).map(ordinary).to(device).args[0]
