"""What int8 is calibrated with: batches of the user's data, as long as the example's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..importance.calibration.data import CalibrationData
from ..runtimes.adapters.source import write_batches
from ..runtimes.arguments import FlatArguments
from ..support.numbers import check_integer
from ..synthesis import made_for
from ..tracing.example import ExampleInput


def check_data(data: Any, samples: int, precisions: Sequence[str]) -> None:
    """Raise GraphPruneError for int8 without data, data without int8, or no number of samples."""
    check_integer("samples", samples, 1)
    if "int8" in precisions and data is None:
        raise GraphPruneError(
            "data: int8 needs inputs to find the ranges of activations: pass a few hundred samples, labels are not "
            "needed, or graphprune.Synthetic(256) to have them made from the model"
        )
    if "int8" not in precisions and data is not None:
        raise GraphPruneError(
            f"data: only int8 looks at data, not {', '.join(precisions)}; leave it out, or ask for 'int8'"
        )


def write_calibration(
    data: Any, model: nn.Module, arguments: FlatArguments, samples: int, path: Path
) -> Path:
    """Write the first `samples` samples of the user's data as batches as long as the example's; what is over is left
    out.

    Raises:
        GraphPruneError: data are in no known form, have other shapes than the example, or fewer samples than a batch.
    """
    batches = list(chunks(_rows(data, model, arguments, samples), arguments))
    if not batches:
        raise GraphPruneError(
            f"data: fewer samples than a batch of the example ({arguments.batch_size}); give more, or a shorter example"
        )
    return write_batches(path, batches)


def _rows(data: Any, model: nn.Module, arguments: FlatArguments, samples: int) -> Iterator[list[Tensor]]:
    """The tensors of each batch of the user's, until there are samples enough."""
    read = CalibrationData(made_for(data, model, arguments.example), arguments.example, model, once=True)
    seen = 0
    for inputs, _ in read.silently():
        tensors = flat_like(inputs, arguments, "data")
        length = next((len(t) for t, b in zip(tensors, arguments.batched, strict=True) if b), 1)
        keep = min(length, samples - seen)
        yield [t[:keep] if b else t for t, b in zip(tensors, arguments.batched, strict=True)]
        seen += keep
        if seen >= samples:
            return


def flat_like(inputs: ExampleInput, arguments: FlatArguments, what: str) -> list[Tensor]:
    """The tensors of a call in the order of the example's, of its shapes but for the batch.

    Raises:
        GraphPruneError: there are others.
    """
    if inputs.kwargs.keys() == arguments.example.kwargs.keys():
        inputs = ExampleInput(inputs.args, {name: inputs.kwargs[name] for name in arguments.example.kwargs})
    tensors = inputs.tensors()
    if len(tensors) != len(arguments.tensors):
        raise GraphPruneError(
            f"{what}: a call with {len(tensors)} tensors where the example has {len(arguments.tensors)} "
            f"({', '.join(arguments.names)})"
        )
    for name, tensor, known, batched in zip(
        arguments.names, tensors, arguments.tensors, arguments.batched, strict=True
    ):
        mine, wanted = (tuple(t.shape[1:] if batched and t.ndim else t.shape) for t in (tensor, known))
        if mine != wanted or tensor.ndim != known.ndim or tensor.dtype != known.dtype:
            raise GraphPruneError(
                f"{what}: {name} has shape {tuple(tensor.shape)} and {tensor.dtype}, the example's "
                f"{tuple(known.shape)} and {known.dtype}; only the number of samples may differ"
            )
    return [t.detach().cpu() for t in tensors]


def chunks(calls: Iterable[Sequence[Tensor]], arguments: FlatArguments) -> Iterator[list[Tensor]]:
    """Whole batches of the example's length from calls of any; what is left over at the end is left out."""
    size = arguments.batch_size
    if size is None:
        yield from map(list, calls)
        return
    held: list[Tensor] | None = None
    for call in calls:
        held = list(call) if held is None else _joined(held, call, arguments.batched)
        batched = next(i for i, b in enumerate(arguments.batched) if b)
        while len(held[batched]) >= size:
            yield [t[:size] if b else t for t, b in zip(held, arguments.batched, strict=True)]
            held = [t[size:] if b else t for t, b in zip(held, arguments.batched, strict=True)]


def _joined(first: Sequence[Tensor], second: Sequence[Tensor], batched: Sequence[bool]) -> list[Tensor]:
    return [torch.cat([a, b]) if free else b for a, b, free in zip(first, second, batched, strict=True)]
