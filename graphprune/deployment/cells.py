"""The files of a benchmark's models, for every runtime, precision and batch size: written, or given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import GraphPruneError
from ..runtimes.adapters import RUNTIMES, Adapter
from ..runtimes.adapters.source import Source, write_batches
from ..runtimes.adapters.workers import RemoteSession, Worker
from ..runtimes.arguments import FlatArguments
from ..runtimes.candidates import Model, check_there, floating_elements, graph_of
from ..runtimes.sources import Answers, Sources
from ..support.files import as_path
from .calibrating import write_calibration
from .comparing import compare


@dataclasses.dataclass
class Made:
    """A file to measure. `names`, `tensors`: of its inputs. `answers`: the module's, None for files. `error`: the
    largest relative one, once compared."""

    path: Path
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    size: int
    parameters: int | None
    notes: Sequence[str]
    answers: Answers | None
    error: float | None = None

    def compare(self, session: RemoteSession, adapter: Adapter, precision: str) -> None:
        """Against the module. Raises GraphPruneError where outputs differ by more than the precision allows."""
        if self.answers is not None:
            allowed = adapter.tolerances.get(precision)
            self.error, _ = compare(session, self.tensors, self.answers, allowed, adapter.title)


@dataclasses.dataclass(frozen=True)
class _Call:
    """How a model is called, what it answers where that is known, and elements of its parameters."""

    arguments: FlatArguments
    answers: Answers | None
    parameters: int


class Models:
    """Modules and files by name, and what was written of them so far.

    A module is captured once for each form and batch size, and written once for each runtime and precision, for every
    batch size anew where a file takes but one.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        example_input: Any,
        sizes: Sequence[int | None],
        folder: Path,
        data: Any,
        samples: int,
        baseline: str,
    ) -> None:
        self.names = tuple(models)
        self._models, self._example, self._folder = models, example_input, folder
        self._several = len(sizes) > 1
        self._data, self._samples = data, samples
        modules = [model for model in (models[baseline], *models.values()) if isinstance(model, nn.Module)]
        self._first = modules[0] if modules else nn.Identity()
        self._sources: dict[tuple[str, int | None], Sources] = {}
        self._written: dict[tuple[Any, ...], Made] = {}
        self._calibrations: dict[int | None, Path] = {}

    def made(self, name: str, size: int | None, adapter: Adapter, precision: str, worker: Worker) -> Made:
        """The file of a model at this batch size.

        Raises GraphPruneError where it cannot be written, or a file is none that the runtime takes.
        """
        model = self._models[name]
        if isinstance(model, nn.Module):
            return self._of_module(name, model, size, adapter, precision, worker)
        path = as_path(model)
        check_there(path)
        arguments = self._arguments(size, None)
        if path.name.endswith(adapter.suffix):
            weight = sum(file.stat().st_size for file in adapter.files(path) if file.is_file())
            return Made(path, arguments.names, arguments.tensors, weight, None, (), None)
        if path.name.endswith(".onnx") and adapter.form == "onnx":
            return self._of_onnx(name, path, arguments, adapter, precision, worker)
        known = next((kind.title for kind in RUNTIMES.values() if path.name.endswith(kind.suffix)), "no known runtime")
        raise GraphPruneError(
            f"{path.name} is a file of {known}, and {adapter.title} takes {adapter.suffix} files"
            f"{' and .onnx files' if adapter.form == 'onnx' else ''}; pass the module instead"
        )

    def _of_module(
        self, name: str, model: nn.Module, size: int | None, adapter: Adapter, precision: str, worker: Worker
    ) -> Made:
        sources = self._sources_of(name, model, size)
        if precision == "int8":
            sources.calibration = self._calibration(size)
        source = sources.source(adapter, any_batch=self._several)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        call = _Call(sources.arguments, sources.answers, parameters)
        return self._write(name, size, source, call, adapter, precision, worker)

    def _of_onnx(
        self, name: str, path: Path, arguments: FlatArguments, adapter: Adapter, precision: str, worker: Worker
    ) -> Made:
        graph = graph_of(path)
        initial = {tensor.name for tensor in graph.initializer}
        inputs = tuple(value.name for value in graph.input if value.name not in initial)
        given = dict(zip(arguments.names, arguments.tensors, strict=True))
        if len(inputs) != len(arguments.tensors):
            raise GraphPruneError(f"{path.name} has the inputs {', '.join(inputs)}; give an example with as many")
        if all(value in given for value in inputs):
            arguments = FlatArguments.of({value: given[value] for value in inputs})
        else:
            arguments = FlatArguments.of(dict(zip(inputs, arguments.tensors, strict=True)))
        size = arguments.batch_size
        source = Source(
            inputs=inputs, outputs=tuple(value.name for value in graph.output), onnx=path,
            example=write_batches(self._folder / f"{self.names.index(name)}-{size}.example", [arguments.tensors]),
            calibration=self._calibration(size) if precision == "int8" else None,
        )  # fmt: skip
        call = _Call(arguments, None, floating_elements(graph))
        return self._write(name, size, source, call, adapter, precision, worker)

    def _write(
        self,
        name: str,
        size: int | None,
        source: Source,
        call: _Call,
        adapter: Adapter,
        precision: str,
        worker: Worker,
    ) -> Made:
        key = (name, adapter.name, precision, None if source.any_batch else size)
        if key not in self._written:
            folder = self._folder / f"{self.names.index(name)}-{adapter.name}-{precision}-{size}"
            folder.mkdir()
            path = folder / f"model{adapter.suffix}"
            notes = worker.write(source, precision, path)
            weight = sum(file.stat().st_size for file in adapter.files(path))
            self._written[key] = Made(path, source.inputs, (), weight, call.parameters, notes, None)
        return dataclasses.replace(self._written[key], tensors=call.arguments.tensors, answers=call.answers)

    def _sources_of(self, name: str, model: nn.Module, size: int | None) -> Sources:
        key = (name, size)
        if key not in self._sources:
            folder = self._folder / f"{self.names.index(name)}-source-{size}"
            folder.mkdir()
            self._sources[key] = Sources(model, self._arguments(size, model).example, folder)
        return self._sources[key]

    def _calibration(self, size: int | None) -> Path:
        if size not in self._calibrations:
            path = self._folder / f"calibration-{size}"
            arguments = self._arguments(size, self._first)
            write_calibration(self._data, self._first, arguments, self._samples, path)
            self._calibrations[size] = path
        return self._calibrations[size]

    def _arguments(self, size: int | None, model: nn.Module | None) -> FlatArguments:
        arguments = FlatArguments.of(self._example, model)
        return arguments if size is None else arguments.resized(size)
