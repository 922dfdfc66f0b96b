"""A network on its way to a runtime, as files: the same for a worker process as for this one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """What adapters write from.

    `onnx`: a file in float32 that was compared with the model. `program`: a `torch.export` program in float32. Both
    take a flat list of tensors named `inputs`, and return those named `outputs`; only the form that the adapter asks
    for is there. `any_batch`: the first axis of what shares the batch is free. `example`: the inputs that were traced.
    `calibration`: a file of batches as long as the example's, None without data.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Path
    onnx: Path | None = None
    program: Path | None = None
    calibration: Path | None = None
    any_batch: bool = False

    @property
    def onnx_file(self) -> Path:
        """The ONNX file."""
        assert self.onnx is not None
        return self.onnx

    @functools.cached_property
    def exported(self) -> Any:
        """The `torch.export.ExportedProgram`, read once: whoever changes parameters of its module changes it too."""
        assert self.program is not None
        return torch.export.load(self.program)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The example's tensors."""
        return tuple(next(read_batches(self.example)))

    def batches(self) -> Iterator[list[Tensor]]:
        """Calibration inputs, batch by batch: one tensor an input. Can be asked for more than once."""
        assert self.calibration is not None
        return read_batches(self.calibration)

    def as_dict(self) -> dict[str, Any]:
        """For a worker."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Source:
        """What `as_dict` gave."""
        given = {name: values[name] for name in ("onnx", "program", "calibration")}
        paths = {name: None if value is None else Path(value) for name, value in given.items()}
        return cls(
            inputs=tuple(values["inputs"]), outputs=tuple(values["outputs"]), example=Path(values["example"]),
            any_batch=values["any_batch"], **paths,
        )  # fmt: skip


def write_batches(path: Path, batches: Sequence[Sequence[Tensor]]) -> Path:
    """Batches as a file: tensors named by their batch and place."""
    named = {
        f"{number}.{place}": tensor.detach().cpu().contiguous().clone()
        for number, batch in enumerate(batches)
        for place, tensor in enumerate(batch)
    }
    save_file(named, path)
    return path


def read_batches(path: Path) -> Iterator[list[Tensor]]:
    """What `write_batches` wrote, one batch at a time."""
    with safe_open(path, "pt") as file:
        places: dict[int, list[int]] = {}
        for name in file.keys():  # noqa: SIM118 - no mapping
            number, place = map(int, name.split("."))
            places.setdefault(number, []).append(place)
        for number in sorted(places):
            yield [file.get_tensor(f"{number}.{place}") for place in sorted(places[number])]
