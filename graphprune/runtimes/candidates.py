"""The ONNX files of the models of a benchmark: exported for it, or given."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..support.files import as_path, check_source, is_there
from ..support.progress import watched
from ..support.types import PathLike
from ..support.unwrapping import checked_model
from .arguments import FlatArguments
from .export import export_onnx

Model = nn.Module | PathLike


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """An ONNX file to measure: elements of its parameters, bytes on disk, relative error against its module."""

    path: Path
    parameters: int
    size: int
    error: float | None


class Candidates:
    """The ONNX file of each model for each batch size, exported when first needed."""

    def __init__(
        self,
        models: Mapping[str, Model],
        example_input: Any,
        sizes: Sequence[int | None],
        folder: Path,
        *,
        opset: int | None,
        check: bool,
    ) -> None:
        self.notes: list[str] = []
        self._example, self._folder, self._opset, self._check = example_input, folder, opset, check
        self._fixed: dict[str, nn.Module] = {}
        self._any: dict[str, ModelFile] = {}
        self._by_size: dict[tuple[str, int | None], ModelFile] = {}
        self._names = list(models)
        for number, (name, model) in enumerate(watched(models.items(), "exporting", len(models), "models")):
            if isinstance(model, (str, os.PathLike)):
                self._any[name] = _existing(name, as_path(model))
                continue
            model = checked_model(model, f"models[{name!r}]")
            arguments = FlatArguments.of(example_input, model)
            if arguments.batch_size is not None:
                try:
                    self._any[name] = self._export(name, model, arguments, f"{number}.onnx", dynamic=True)
                    continue
                except GraphPruneError as error:
                    reason = str(error)
                # Not the batch but the model may be at fault: then this says so.
                self._export_fixed(name, model, sizes[0])
                self.notes.append(f"{name!r} was exported once per batch size, as a dynamic batch failed: {reason}")
            self._fixed[name] = model

    def at(self, size: int | None) -> dict[str, ModelFile]:
        """The file of each model, in the order given, that runs at this batch size."""
        files = {}
        for name in self._names:
            if name in self._any:
                files[name] = self._any[name]
            else:
                files[name] = self._export_fixed(name, self._fixed[name], size)
        return files

    def _export_fixed(self, name: str, model: nn.Module, size: int | None) -> ModelFile:
        key = (name, size)
        if key not in self._by_size:
            arguments = FlatArguments.of(self._example, model)
            call = arguments if size is None else arguments.resized(size)
            file = f"{self._names.index(name)}-batch-{size}.onnx"
            self._by_size[key] = self._export(name, model, call, file, dynamic=False)
        return self._by_size[key]

    def _export(self, name: str, model: nn.Module, call: FlatArguments, file: str, *, dynamic: bool) -> ModelFile:
        try:
            report = export_onnx(
                model,
                call.example,
                self._folder / file,
                opset=self._opset,
                dynamic_batch=dynamic,
                check=self._check,
            )
        except GraphPruneError as error:
            raise GraphPruneError(f"model {name!r}: {error}") from error
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return ModelFile(report.path, parameters, report.size, report.max_relative_error)


def _existing(name: str, path: Path) -> ModelFile:
    try:
        check_there(path)
        graph = graph_of(path)
    except GraphPruneError as error:
        raise GraphPruneError(f"model {name!r}: {error}") from error
    parameters = floating_elements(graph)
    beside = {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}
    files = [path, *(path.parent / location for location in sorted(beside))]
    return ModelFile(path, parameters, sum(file.stat().st_size for file in files if file.is_file()), None)


def check_there(path: Path) -> None:
    """Raise GraphPruneError unless there is a file that can be read."""
    if not is_there(path):
        raise GraphPruneError(f"there is no file {path}")
    check_source(path)


def graph_of(path: Path) -> Any:
    """The graph of an ONNX file, without weights that lie beside it. Raises GraphPruneError where it is none."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise GraphPruneError(f"{path} is no ONNX file: {error}") from error


def floating_elements(graph: Any) -> int:
    """Elements of the floating-point initializers of an ONNX graph."""
    from onnx import TensorProto

    floating = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    return sum(math.prod(t.dims) for t in graph.initializer if t.data_type in floating)
