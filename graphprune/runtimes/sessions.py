"""ONNX Runtime sessions with everything fixed: provider, threads, and where the tensors live."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GraphPruneError
from ..support.types import PathLike
from .arguments import FlatArguments
from .providers import CPU, Provider, runtime

# ONNX element types: the number in a file, and the name in ONNX Runtime's description of an input.
_ONNX_TYPES: dict[torch.dtype, tuple[int, str]] = {
    torch.float32: (1, "float"),
    torch.uint8: (2, "uint8"),
    torch.int8: (3, "int8"),
    torch.uint16: (4, "uint16"),
    torch.int16: (5, "int16"),
    torch.int32: (6, "int32"),
    torch.int64: (7, "int64"),
    torch.bool: (9, "bool"),
    torch.float16: (10, "float16"),
    torch.float64: (11, "double"),
    torch.uint32: (12, "uint32"),
    torch.uint64: (13, "uint64"),
    torch.bfloat16: (16, "bfloat16"),
}


def open_session(
    path: PathLike,
    provider: Provider,
    *,
    threads: int,
    provider_options: Mapping[str, Any] | None = None,
    cuda_graph: bool = False,
    profile: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` that certainly runs on `provider`.

    `threads` threads inside a node, one node at a time, all graph optimisations. Threads stop spinning when a run
    ends, so that an idle session takes nothing from the one that is measured next. Nodes that the provider does not
    have run on the CPU (see `probe`). `profile`: the beginning of the name of a trace file.

    Raises:
        GraphPruneError: the file cannot be loaded, or the provider did not start.
    """
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    settings = {str(key): str(value) for key, value in (provider_options or {}).items()}
    if cuda_graph:
        settings["enable_cuda_graph"] = "1"
    providers: list[Any] = [(provider.name, settings)]
    if provider.name != CPU:
        providers.append(CPU)
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise GraphPruneError(
            f"ONNX Runtime ({provider.name}) cannot load {Path(path).name}: {_first_line(error)}{_dtype_hint(error)}"
        ) from error
    if session.get_providers()[0] != provider.name:
        raise GraphPruneError(
            f"ONNX Runtime fell back to {session.get_providers()[0]} instead of {provider.name} for {Path(path).name}; "
            f"check provider_options {dict(provider_options or {})}"
        )
    session.disable_fallback()
    return session


def match_inputs(session: Any, arguments: FlatArguments) -> list[tuple[str, Tensor]]:
    """(name, tensor) for each input of the file: by name where all are known, else by position.

    Raises:
        GraphPruneError: other inputs, dtypes or fixed sizes than those of `arguments`.
    """
    wanted = session.get_inputs()
    given = dict(zip(arguments.names, arguments.tensors, strict=True))
    names = [node.name for node in wanted]
    if all(name in given for name in names):
        pairs = [(node, given[node.name]) for node in wanted]
    elif len(names) == len(arguments.tensors) and not any(
        name in given and name != own for name, own in zip(names, arguments.names, strict=True)
    ):
        pairs = list(zip(wanted, arguments.tensors, strict=True))
    else:
        raise GraphPruneError(
            f"the file has the inputs {names}, but example_input holds {len(arguments.tensors)} tensors "
            f"({', '.join(arguments.names)}); give a dict with these names"
        )
    for node, tensor in pairs:
        kind = _ONNX_TYPES.get(tensor.dtype)
        if kind is None or node.type != f"tensor({kind[1]})":
            raise GraphPruneError(
                f"input {node.name!r} of the file is a {node.type}, but that of the example is {tensor.dtype}"
            )
        sizes = list(node.shape)
        fits = len(sizes) == tensor.ndim and all(
            not isinstance(size, int) or size == own for size, own in zip(sizes, tensor.shape, strict=False)
        )
        if not fits:
            raise GraphPruneError(
                f"input {node.name!r} of the file has shape {sizes}, which does not take {list(tensor.shape)}; "
                f"a size that is a number was fixed when the file was exported"
            )
    return [(node.name, tensor) for node, tensor in pairs]


@dataclasses.dataclass(frozen=True)
class Output:
    """Shape and ONNX element type of an output for one input."""

    shape: tuple[int, ...]
    element_type: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one run showed: nodes of the optimised graph per provider, and the outputs in the order of the file."""

    nodes: Mapping[str, int]
    outputs: tuple[Output, ...]


class BoundSession:
    """A session whose inputs and outputs lie on its device, so that a run copies nothing.

    With `outputs`, memory for them is allocated once and every run writes to it, as CUDA graphs need; without, ONNX
    Runtime allocates them in the first run and later runs write to the same place.
    """

    def __init__(
        self,
        session: Any,
        arguments: FlatArguments,
        provider: Provider,
        device_id: int = 0,
        *,
        outputs: Sequence[Output] | None = None,
    ) -> None:
        """Raises GraphPruneError if the inputs do not fit the file or the first run fails."""
        self.session = session
        self._device = provider.device
        self._binding = session.io_binding()
        names = [node.name for node in session.get_outputs()]
        self._inputs = [
            (name, _to_device(tensor, self._device, device_id)) for name, tensor in match_inputs(session, arguments)
        ]
        for name, value in self._inputs:
            self._binding.bind_ortvalue_input(name, value)
        if outputs is None:
            for name in names:
                self._binding.bind_output(name, self._device, device_id)
        else:
            self._bind_outputs(names, [_allocate(output, self._device, device_id) for output in outputs])
        try:
            self.run()
        except Exception as error:
            raise GraphPruneError(
                f"ONNX Runtime ({provider.name}) cannot run the model: {_first_line(error)}{_dtype_hint(error)}"
            ) from error
        if outputs is None:
            self._bind_outputs(names, self._binding.get_outputs())

    def _bind_outputs(self, names: Sequence[str], values: Sequence[Any]) -> None:
        # Kept, because the binding does not own the memory.
        self._outputs = list(values)
        for name, value in zip(names, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """One run, finished when this returns."""
        self.session.run_with_iobinding(self._binding)
        if self._device != "cpu":
            self._binding.synchronize_outputs()

    def outputs(self) -> list[Tensor]:
        """The results of the last run, as tensors on the CPU, in the order of the file."""
        return [_to_tensor(value) for value in self._outputs]

    def output_types(self) -> tuple[Output, ...]:
        """Shape and element type of each output."""
        return tuple(Output(tuple(value.shape()), value.element_type()) for value in self._outputs)


def run_once(session: Any, arguments: FlatArguments, provider: Provider, device_id: int = 0) -> list[Tensor]:
    """The outputs of one run, as tensors on the CPU, in the order of the file.

    Raises:
        GraphPruneError: the inputs do not fit the file, or the run fails.
    """
    return BoundSession(session, arguments, provider, device_id).outputs()


def probe(
    path: PathLike,
    arguments: FlatArguments,
    provider: Provider,
    folder: Path,
    *,
    provider_options: Mapping[str, Any] | None = None,
) -> Probe:
    """Run the file once under ONNX Runtime's profiler, whose trace (written to `folder`) says what ran where.

    Raises:
        GraphPruneError: the file cannot be loaded or run.
    """
    session = open_session(
        path, provider, threads=1, provider_options=provider_options, profile=folder / f"{Path(path).stem}-trace"
    )
    outputs = BoundSession(session, arguments, provider, device_of(provider_options)).output_types()
    ran = {
        (event["args"]["provider"], event["args"].get("node_index"), event["name"])
        for event in kernel_events(session)
        if event["args"].get("provider")
    }
    counts = Counter(name for name, _, _ in ran)
    return Probe(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))), outputs)


def kernel_events(session: Any) -> list[dict[str, Any]]:
    """What the profiler of a session saw of its nodes' own work, run by run. Ends the profile and deletes its file."""
    trace = Path(session.end_profiling())
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))
    trace.unlink()
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def device_of(provider_options: Mapping[str, Any] | None) -> int:
    """The number of the GPU that the options choose, 0 unless said."""
    value = (provider_options or {}).get("device_id", 0)
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise GraphPruneError(f"provider_options: device_id must be an integer, got {value!r}") from error


def _to_device(tensor: Tensor, device: str, device_id: int) -> Any:
    onnxruntime = runtime()
    data = tensor.detach().cpu().contiguous()
    if data.dtype == torch.bfloat16:
        # numpy has no bfloat16: the bits travel as integers.
        bits = data.view(torch.int16).numpy()
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_TYPES[torch.bfloat16][0])
        if device == "cpu":
            return value
        there = _allocate(Output(tuple(data.shape), _ONNX_TYPES[torch.bfloat16][0]), device, device_id)
        there.update_inplace(value)
        return there
    # A copy: on the CPU the value is a view of the array, and a model may write into its input.
    return onnxruntime.OrtValue.ortvalue_from_numpy(data.numpy().copy(), device, device_id)


def _allocate(output: Output, device: str, device_id: int) -> Any:
    return runtime().OrtValue.ortvalue_from_shape_and_type(
        list(output.shape), output.element_type, device, device_id
    )


def _to_tensor(value: Any) -> Tensor:
    if value.element_type() == _ONNX_TYPES[torch.bfloat16][0]:
        shared: Tensor = torch.utils.dlpack.from_dlpack(value)
        return shared.to("cpu", copy=True)
    return torch.from_numpy(value.numpy().copy())


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    # The path is that of a temporary file.
    return re.sub(r"Load model from .* failed:", "", text.splitlines()[0])[:400].rstrip(".")


def _dtype_hint(error: Exception) -> str:
    text = str(error)
    if not any(word in text for word in ("NOT_IMPLEMENTED", "bfloat16", "float16", "double")):
        return ""
    return ". It may lack this operator for this dtype: export model.float(), or pass check=False to export_onnx"


