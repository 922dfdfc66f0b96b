"""What runtimes are written from, made of a module once for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dependency.reparametrised import plain
from ..errors import GraphPruneError
from .adapters import Adapter
from .adapters.source import Source, write_batches
from .arguments import FlatArguments, named_outputs
from .capture import inference_state, run_model
from .export import export_onnx
from .parity import exact_float32
from .programs import save_program


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model itself says to the example: its result, and the tensors in it by name."""

    result: Any
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


class Sources:
    """The sources of one model in one folder, each made when it is first asked for.

    `check`: whether ONNX files are compared with the model.

    Raises GraphPruneError where the model does not run, or is not in float32: precisions are the runtime's affair.
    """

    def __init__(self, model: nn.Module, example_input: Any, folder: Path, *, check: bool = True) -> None:
        self.model = plain(model)
        self.arguments = FlatArguments.of(example_input, self.model)
        self._folder, self._check = folder, check
        self._made: dict[tuple[str, bool], Source] = {}
        # Batches for int8, by `write_calibration`.
        self.calibration: Path | None = None
        _check_float32(self.model, self.arguments)
        with inference_state(self.model), exact_float32():
            result = run_model(self.model, self.arguments)
        names, tensors = named_outputs(result, self.arguments.names)
        self.answers = Answers(result, tuple(names), tuple(t.detach().cpu() for t in tensors))

    def source(self, adapter: Adapter, any_batch: bool) -> Source:
        """What this adapter writes from. `any_batch`: as in `Source`, where the adapter can have it so."""
        free = any_batch and adapter.any_batch and self.arguments.batch_size is not None
        key = (adapter.form, free)
        if key not in self._made:
            self._made[key] = self._make(adapter.form, free)
        return dataclasses.replace(self._made[key], calibration=self.calibration)

    def _make(self, form: str, free: bool) -> Source:
        stem = f"{form}-{'any' if free else 'fixed'}"
        example = write_batches(self._folder / f"{stem}.example", [self.arguments.tensors])
        made = Source(
            inputs=self.arguments.names, outputs=self.answers.names, example=example, any_batch=free
        )  # fmt: skip
        if form == "onnx":
            report = export_onnx(
                self.model, self.arguments.example, self._folder / f"{stem}.onnx", dynamic_batch=free, check=self._check
            )
            return dataclasses.replace(made, onnx=report.path)
        with inference_state(self.model):
            path = save_program(self.model, self.arguments, self._folder / f"{stem}.pt2", any_batch=free)
        return dataclasses.replace(made, program=path)


def _check_float32(model: nn.Module, arguments: FlatArguments) -> None:
    named = (*model.named_parameters(), *model.named_buffers(), *zip(arguments.names, arguments.tensors, strict=True))
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise GraphPruneError(
                f"{name!r} is in {tensor.dtype}; expected float32, from which every precision is made: pass "
                f"model.float() and such an example, and say precision="
            )
        if tensor.is_complex():
            raise GraphPruneError(f"{name!r} holds complex numbers, which no runtime takes")
