"""ONNX Runtime: ONNX files, in float32, float16 (on GPUs) and static int8 (on CPUs)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...errors import GraphPruneError
from ..arguments import FlatArguments
from ..capture import quiet
from ..external import named_by_contents, weights_beside
from ..profiles import NodeTime, profile
from ..providers import CPU, CUDA, TENSORRT, Provider, resolve_provider
from ..sessions import BoundSession, kernel_events, open_session
from .base import Adapter, Opening, Session
from .naming import first_lines
from .quantisation import is_large, write_int8
from .shares import Share
from .source import Source

_NO_FLOAT16 = (
    "kernels of ONNX Runtime for the CPU compute in float32 and convert to and fro around each operator; use fp32 or "
    "int8, provider='cuda', or runtime='openvino'"
)
_NO_INT8 = (
    "the file is quantised for kernels of the CPU, with unsigned activations; CUDA has none for it and computes in "
    "float32, TensorRT wants signed ones; use fp16"
)


class OnnxRuntime(Adapter):
    """See `base.Adapter`."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    suffix = ".onnx"
    form: ClassVar[Literal["onnx", "program"]] = "onnx"
    any_batch = True
    packages = (("onnxruntime", "onnxruntime"),)
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported",
        "fp16": "weights and all that is computed in float16, inputs and outputs in float32; on GPUs",
        "int8": "static: quantise-dequantise nodes, weights per channel, ranges of activations from data; on CPUs",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "bf16": "ONNX Runtime has bfloat16 kernels for a few operators only and no tool that converts to it; use "
        "runtime='openvino' on a CPU, fp16 on a GPU",
    }
    providers = ("cpu", "cuda", "tensorrt")

    def why_refused(self, precision: str, provider: str | None = None) -> str | None:
        here = _on_cpu(provider)
        if precision == "fp16" and here:
            return _NO_FLOAT16
        if precision == "int8" and not here:
            return _NO_INT8
        return super().why_refused(precision, provider)

    def layout(self, precision: str) -> str:
        return "NHWC where convolutions are integer" if precision == "int8" else "NCHW, in blocks of channels on CPUs"

    def files(self, path: Path) -> tuple[Path, ...]:
        return (*weights_beside(path), path)

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        if precision == "int8":
            return _write_int8(source, path)
        if precision == "fp16":
            _write_float16(source, path)
        else:
            _copy(source.onnx_file, path)
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, opening)

    def nodes(self, path: Path, opening: Opening, runs: int) -> Sequence[NodeTime]:
        provider = resolve_provider(opening.provider or "cpu")
        if provider.name != CPU:  # elsewhere the profiler sees only that work was handed over
            return ()
        feeds = {name: tensor.numpy() for name, tensor in zip(opening.names, opening.tensors, strict=True)}
        return profile(path, feeds, provider, threads=opening.threads, options={}, runs=runs).nodes


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening) -> None:
        self._path, self._precision = path, opening.precision
        self._provider = resolve_provider(opening.provider or "cpu")
        self._session = open_session(path, self._provider, threads=opening.threads)
        self._names = opening.names
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._arguments = FlatArguments.of(dict(zip(self._names, tensors, strict=True)))
        self._bound = BoundSession(self._session, self._arguments, self._provider)

    def run(self) -> None:
        self._bound.run()

    def outputs(self) -> list[Tensor]:
        return self._bound.outputs()

    def in_force(self) -> str:
        if self._precision == "fp32" and self._provider.name == CPU:
            return "float32"
        return str(share(self._path, self._arguments, self._provider))


def share(path: Path, arguments: FlatArguments, provider: Provider) -> Share:
    """What the layers of a file are computed in, seen in one run under the profiler."""
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        session = open_session(path, provider, threads=1, profile=Path(folder) / "trace")
        BoundSession(session, arguments, provider)
        events = kernel_events(session)
    layers = {}
    for event in events:
        said = event["args"]
        types = [kind for entry in said.get("input_type_shape", ()) for kind in entry]
        if types and _is_layer(said.get("op_name", "")):
            layers[event["name"].removesuffix("_kernel_time"), said.get("node_index")] = types[0]
    return Share.of((name, _TYPES.get(kind, kind)) for (name, _), kind in layers.items())


_TYPES = {"float": "float32", "uint8": "int8", "double": "float64"}


def _is_layer(operator: str) -> bool:
    return any(part in operator for part in ("Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum", "Attention"))


def _on_cpu(provider: str | None) -> bool:
    if provider is None or provider.lower() in ("cpu", CPU.lower()):
        return True
    known = ("cuda", "tensorrt", CUDA.lower(), TENSORRT.lower())
    return provider.lower() not in known and resolve_provider(provider).device == "cpu"


def _copy(graph: Path, path: Path) -> None:
    weights = weights_beside(graph)
    shutil.copyfile(graph, path)
    for file in weights:
        named_by_contents(path, Path(shutil.copyfile(file, path.with_name(file.name))))


def _write_float16(source: Source, path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        with quiet():
            large = is_large(source.onnx_file)
            network: Any = str(source.onnx_file) if large else onnx.load(str(source.onnx_file))
            converted = convert_float_to_float16(network, keep_io_types=True)
            beside = f"{path.name}.data" if large else None
            onnx.save(converted, str(path), save_as_external_data=large, location=beside)
    except Exception as error:
        said = first_lines(error)
        raise GraphPruneError(f"ONNX Runtime's tools cannot convert the network to float16: {said}") from error
    for file in weights_beside(path):
        named_by_contents(path, file)


def _write_int8(source: Source, path: Path) -> list[str]:
    notes = write_int8(source, path)
    arguments = FlatArguments.of(dict(zip(source.inputs, source.tensors, strict=True)))
    return [*share(path, arguments, Provider(CPU)).notes("int8"), *notes]
