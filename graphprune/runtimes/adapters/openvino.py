"""OpenVINO on CPUs: its own files (.xml and .bin), in float32, bfloat16, float16 and int8."""

from __future__ import annotations

import datetime
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import GraphPruneError
from ..profiles import NodeTime
from .base import Adapter, Opening, Session
from .features import cpu_features
from .naming import first_lines
from .quantisation import write_int8
from .shares import Share
from .source import Source

# What is asked for; the network's own int8 layers stay what they are, and the rest is exact.
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
_NEEDED = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "asimd")}
_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell", "LSTM", "GRU", "ScaledDot")
# Sessions whose nodes are timed, and their runs before that counts.
_SITTINGS, _WARM = 3, 3
_MICROSECOND = datetime.timedelta(microseconds=1)
_SAID = ("layerType", "runtimePrecision", "originalLayersNames")
_TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i8": "int8", "u8": "int8"}


class OpenVino(Adapter):
    """See `base.Adapter`."""

    name = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    form: ClassVar[Literal["onnx", "program"]] = "onnx"
    any_batch = True
    packages = (("openvino", "openvino"),)
    extra = "openvino"
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported; the weights are not rounded to float16, which OpenVINO does unless told not to",
        "bf16": "the file of fp32, computed in bfloat16: OpenVINO's own default on CPUs that have it",
        "fp16": "weights in float16, computed in float16 on CPUs that have it",
        "int8": "static: weights per channel, ranges of activations from data, the rest in float32",
    }

    def why_refused(self, precision: str, provider: str | None = None) -> str | None:
        features = cpu_features()
        wanted = _NEEDED.get(precision, ())
        # Where the system says nothing of its CPU, `open` looks at what OpenVINO makes of it.
        if wanted and features and not set(wanted) & set(features):
            return f"this CPU has none of {', '.join(wanted)}, and OpenVINO would compute in float32; use fp32 or int8"
        return super().why_refused(precision, provider)

    def bring(self, module: str) -> Any:
        return _openvino()

    def layout(self, precision: str) -> str:
        return "NHWC or blocks of channels, chosen by operator"

    def files(self, path: Path) -> tuple[Path, ...]:
        return (path.with_suffix(".bin"), path)

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        openvino = _openvino()
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            graph, notes = source.onnx_file, list[str]()
            if precision == "int8":
                graph = Path(folder) / "quantised.onnx"
                notes = write_int8(source, graph)
            try:
                network = _core().read_model(str(graph))
                openvino.save_model(network, str(path), compress_to_fp16=precision == "fp16")
            except Exception as error:
                raise GraphPruneError(f"OpenVINO cannot convert the network: {first_lines(error)}") from error
            del network  # its weights lie in the folder
        if precision == "int8":
            session = _Opened(path, Opening(source.inputs, source.tensors, precision))
            notes = [*session.share().notes("int8"), *notes]
        return notes

    def open(self, path: Path, opening: Opening) -> Session:
        if opening.provider not in (None, "cpu"):
            raise GraphPruneError(f"provider: the openvino runtime has the CPU alone, got {opening.provider!r}")
        return _Opened(path, opening)

    def nodes(self, path: Path, opening: Opening, runs: int) -> Sequence[NodeTime]:
        """The least of what some sessions tell: each tells means over all its runs, so that one disturbance spoils all
        that it tells."""
        found: dict[str, NodeTime] = {}
        for _ in range(_SITTINGS):
            for name, node in _Opened(path, opening, counting=True).nodes(max(2, runs // _SITTINGS)).items():
                found[name] = min(found.get(name, node), node, key=lambda n: n.seconds)
        return tuple(found.values())


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening, *, counting: bool = False) -> None:
        self._precision = opening.precision
        core = _core()
        try:
            network = core.read_model(str(path))
        except Exception as error:
            raise GraphPruneError(f"OpenVINO cannot read {path.name}: {first_lines(error)}") from error
        ports = _in_order(network, opening.names)
        _check_types(ports, opening)
        try:
            shapes = {port: list(t.shape) for port, t in zip(ports, opening.tensors, strict=True)}
            network.reshape(shapes)
            self._compiled = core.compile_model(network, "CPU", {**_settings(opening), "PERF_COUNT": counting})
        except Exception as error:
            given = ", ".join(str(list(tensor.shape)) for tensor in opening.tensors)
            said = first_lines(error)
            raise GraphPruneError(f"OpenVINO cannot compile {path.name} for inputs {given}: {said}") from error
        self._products = {op.get_friendly_name() for op in network.get_ordered_ops() if op.get_type_name() == "MatMul"}
        self._request = self._compiled.create_infer_request()
        self._indices = [network.get_parameter_index(port.get_node()) for port in ports]
        self._check_in_force()
        self.load(opening.tensors)

    def _check_in_force(self) -> None:
        """A CPU without a type makes OpenVINO compute in another one, and say nothing."""
        found = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        wanted = _HINTS[self._precision]
        if found != wanted:
            raise GraphPruneError(
                f"precision {self._precision!r}: OpenVINO computes in {_TYPES.get(found, found)} on this CPU; use fp32 "
                f"or int8"
            )

    def load(self, tensors: Sequence[Tensor]) -> None:
        openvino = _openvino()
        # Kept, because OpenVINO reads from the same memory.
        self._arrays = [tensor.detach().cpu().contiguous().numpy().copy() for tensor in tensors]
        for index, array in zip(self._indices, self._arrays, strict=True):
            self._request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))

    def run(self) -> None:
        self._request.infer()

    def outputs(self) -> list[Tensor]:
        count = len(self._compiled.outputs)
        return [torch.from_numpy(self._request.get_output_tensor(i).data.copy()) for i in range(count)]

    def nodes(self, runs: int) -> dict[str, NodeTime]:
        """What each node takes, named by all it was made of, in the mean of so many runs after some others. For
        sessions that count."""
        for _ in range(_WARM):
            self.run()
        before = self._counted()
        for _ in range(runs):
            self.run()
        # a count is a mean over all runs so far, in whole microseconds
        now = self._counted()
        spent = {name: ((_WARM + runs) * us - _WARM * before.get(name, 0)) / runs for name, us in now.items()}
        found = {}
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            name = node.get_friendly_name()
            said = node.get_rt_info()
            kind, made_of = said["layerType"].value, said["originalLayersNames"].value
            if name in spent:
                shapes = [tuple(tuple(port.get_shape()) for port in ports) for ports in (node.inputs(), node.outputs())]
                found[name] = NodeTime(made_of or name, kind, shapes[0], shapes[1], 1e-6 * max(0.0, spent[name]))
        return found

    def _counted(self) -> dict[str, int]:
        """Microseconds by node, of those that run."""
        ran = [node for node in self._request.get_profiling_info() if node.status.name == "EXECUTED"]
        return {node.node_name: node.real_time // _MICROSECOND for node in ran}

    def share(self) -> Share:
        """What the layers are computed in, as the compiled network says."""
        layers = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            said = {key: value.value for key, value in node.get_rt_info().items() if key in _SAID}
            kind, precision = said.get("layerType", ""), said.get("runtimePrecision", "")
            if kind == "Subgraph":
                # Attention is compiled as one piece with what surrounds it.
                names = [name for name in said.get("originalLayersNames", "").split(",") if name in self._products]
            else:
                names = [node.get_friendly_name()] if kind.startswith(_LAYERS) else []
            layers += [(name, _TYPES.get(precision, precision)) for name in names]
        return Share.of(layers)

    def in_force(self) -> str:
        return str(self.share()) or _TYPES[_HINTS[self._precision]]


def _openvino() -> Any:
    """The module. Its import tells its makers that it was imported and leaves a number for this user in the home
    folder, unless it runs in CI, as it is told here: whoever exports a network has not asked for that."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import openvino
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
    return openvino


@functools.cache
def _core() -> Any:
    """One for the life of the process. With the last of them OpenVINO unloads what runs on the CPU, and with that frees
    the memory that it has told the system to handle signals on: the next Ctrl-C would end the process."""
    return _openvino().Core()


def _settings(opening: Opening) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[opening.precision],
        "INFERENCE_NUM_THREADS": opening.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _in_order(network: Any, names: Sequence[str]) -> list[Any]:
    """The inputs of a network in the order of `names`; by position where they are called otherwise."""
    ports = list(network.inputs)
    by_name = {name: port for port in ports for name in port.get_names()}
    if all(name in by_name for name in names) and len(names) == len(ports):
        return [by_name[name] for name in names]
    if len(names) == len(ports):
        return ports
    found = ", ".join(port.get_any_name() for port in ports)
    raise GraphPruneError(f"the file has the inputs {found}, but the example holds {', '.join(names)}")


def _check_types(ports: Sequence[Any], opening: Opening) -> None:
    for port, name, tensor in zip(ports, opening.names, opening.tensors, strict=True):
        wanted = torch.from_numpy(np.empty(0, port.get_element_type().to_dtype())).dtype
        if tensor.dtype != wanted:
            raise GraphPruneError(f"input {name!r} of the file is {wanted}, but that of the example is {tensor.dtype}")
