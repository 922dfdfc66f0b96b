"""MNN on CPUs: .mnn files, in float32 and float16."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import GraphPruneError
from .base import Adapter, Opening, Session
from .places import place_in
from .source import Source

_DTYPES = (torch.float32, torch.int32, torch.int64)
# "high" allows what is fast in float32 alone, "low" half precision where there are kernels.
_PRECISIONS = {"fp32": "high", "fp16": "low"}
_FLAGS = {"fp32": (), "fp16": ("--fp16",)}
# The module behind the package's own command, which would also install packages and report its use over the network:
# importing MNN.tools is enough for that. In a process of its own, because it ends the process on some networks.
_CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


class Mnn(Adapter):
    """See `base.Adapter`.

    `tolerances`: MNN computes 3x3 convolutions by Winograd transforms with large tiles, whose rounding errors are about
    1e-3 (2e-3 in the worst layer seen) of the largest output in float32 at its highest precision; its option for small
    tiles makes them exact and takes twice as long, so what is compared is what is run. GELU is the one by tanh, 5e-4.
    """

    name = "mnn"
    title = "MNN"
    suffix = ".mnn"
    form: ClassVar[Literal["onnx", "program"]] = "onnx"
    any_batch = True
    packages = (("MNN", "MNN"),)
    extra = "mnn"
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": 'precision "high"; 3x3 convolutions are good to 1e-3, as MNN computes them',
        "fp16": "weights in float16, half the size; computed in float16 on ARM CPUs that have it, in float32 elsewhere",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "bf16": "MNN's packages have no kernels for it and would compute in float32; use fp32",
        "int8": "MNN quantises weights alone, which makes the file smaller and is no faster, and its packages bring no "
        "tool that finds the ranges of activations; use onnxruntime, openvino, executorch or litert",
    }
    tolerances: ClassVar[Mapping[str, float]] = {"fp32": 5e-3, "fp16": 1e-2}

    def layout(self, precision: str) -> str:
        return "NCHW, channels in groups of 4 to 16"

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        for name, tensor in zip(source.inputs, source.tensors, strict=True):
            _check_type(name, tensor)
        said = _convert(source.onnx_file, path, _FLAGS[precision])
        if not path.is_file():
            raise GraphPruneError(f"MNN cannot convert the network: {_reason(said, source.onnx_file)}")
        if precision == "fp16" and not _arithmetic():
            return ("MNN computes in float32 on this CPU: the file is half as large, and no faster",)
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, opening)


def _convert(graph: Path, path: Path, flags: Sequence[str]) -> str:
    """Let MNN write `path`; what it says, and how it ended if it did so by a signal."""
    # Without --useOriginRNNImpl the converter dies on an LSTM of torch's exporter.
    settings = ["-f", "ONNX", "--modelFile", str(graph), "--MNNModel", str(path), "--bizCode", "graphprune"]
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, *settings, "--useOriginRNNImpl", *flags], cwd=path.parent, capture_output=True,
        text=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        path.unlink(missing_ok=True)
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        return f"{done.stdout}\n{done.stderr}\nits converter {how}"
    return f"{done.stdout}\n{done.stderr}"


def _reason(said: str, graph: Path) -> str:
    lines = [re.sub(r"^\[[\d:]+\] :\d+: ", "", line.strip()) for line in said.splitlines()]
    for line in lines:
        if "Not Support" in line:
            operators = re.findall(r"ONNX::(\w+)", line)
            if operators:
                return "it has no " + ", ".join(name + place_in(graph, name) for name in operators)
    kept = [line for line in lines if line and "Failed" not in line]
    return " | ".join(kept[-2:])[:400] or "it gives no reason"


def _check_type(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise GraphPruneError(f"MNN takes inputs in float32, int32 and int64, but {name!r} is {kind}; convert it")
    if tensor.dtype == torch.int64 and tensor.numel():
        limits = torch.iinfo(torch.int32)
        if int(tensor.min()) < limits.min or int(tensor.max()) > limits.max:
            raise GraphPruneError(f"MNN has integers of 32 bits: input {name!r} holds larger ones")


def _arithmetic() -> bool:
    """Whether MNN has kernels in float16 for CPUs of this kind."""
    return platform.machine().lower() in ("aarch64", "arm64")


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening) -> None:
        import MNN
        import MNN.expr

        self._library, self._precision, self._names = MNN, opening.precision, opening.names
        settings = {"backend": "CPU", "precision": _PRECISIONS[opening.precision], "numThread": opening.threads}
        # Kept, because the module does not.
        self._manager = MNN.nn.create_runtime_manager((settings,))
        try:
            self._module = MNN.nn.load_module_from_file(
                str(path), list(opening.names), [], runtime_manager=self._manager
            )
        except Exception as error:
            raise GraphPruneError(
                f"MNN cannot load {path.name}: it is no MNN file, damaged, or has other inputs than "
                f"{', '.join(opening.names)}"
            ) from error
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        expr = self._library.expr
        self._inputs = []
        for name, tensor in zip(self._names, tensors, strict=True):
            _check_type(name, tensor)
            floats = tensor.is_floating_point()
            array = tensor.detach().cpu().contiguous().numpy()
            value = expr.placeholder(list(tensor.shape), expr.NCHW, expr.float if floats else expr.int)
            value.write(array if floats else array.astype(np.int32))
            self._inputs.append(value)

    def run(self) -> None:
        self._found = self._module.forward(self._inputs)
        if not self._found:
            shapes = ", ".join(str(list(value.shape)) for value in self._inputs)
            raise GraphPruneError(f"MNN cannot run the network on inputs of shapes {shapes}")

    def outputs(self) -> list[Tensor]:
        return [self._tensor(value) for value in self._found]

    def _tensor(self, value: Any) -> Tensor:
        expr = self._library.expr
        plain = expr.convert(value, expr.NCHW) if value.data_format == expr.NC4HW4 else value
        # A copy: the memory is MNN's.
        return torch.from_numpy(np.array(plain.read()).reshape(plain.shape))

    def in_force(self) -> str:
        if self._precision == "fp16":
            return "float16 where the CPU has it" if _arithmetic() else "float32, weights in float16"
        return "float32"
