"""PyTorch itself: a `torch.export` program, run as it is ("torch") or compiled by inductor ("inductor")."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import GraphPruneError
from .base import Adapter, Opening, Session
from .source import Source

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Torch(Adapter):
    """See `base.Adapter`."""

    name = "torch"
    title = "PyTorch"
    suffix = ".pt2"
    form: ClassVar[Literal["onnx", "program"]] = "program"
    any_batch = True
    packages = (("torch", "torch"),)
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported", "bf16": "weights and inputs in bfloat16", "fp16": "weights and inputs in float16",
    }  # fmt: skip
    refused: ClassVar[Mapping[str, str]] = {
        "int8": "PyTorch runs quantised programs in float32 unless inductor compiles them, and its quantiser refuses "
        "networks that use one ReLU module twice; use onnxruntime or openvino",
    }

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        assert source.program is not None
        shutil.copyfile(source.program, path)
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(self._function(path, opening), opening)

    def _function(self, path: Path, opening: Opening) -> Any:
        try:
            module = torch.export.load(path).module()
        except Exception as error:
            raise GraphPruneError(f"{path.name} is no program of torch.export: {_line(error)}") from error
        return module.to(_DTYPES[opening.precision])


class Inductor(Torch):
    """See `base.Adapter`."""

    name = "inductor"
    title = "PyTorch (inductor)"

    def unable(self) -> str | None:
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            return "inductor compiles C++ and finds no compiler: install g++ or clang++"
        return None

    def _function(self, path: Path, opening: Opening) -> Any:
        return torch.compile(super()._function(path, opening), backend="inductor", fullgraph=True)


class _Opened(Session):
    def __init__(self, function: Any, opening: Opening) -> None:
        self._function, self._dtype = function, _DTYPES[opening.precision]
        torch.set_num_threads(opening.threads)
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]

    def run(self) -> None:
        with torch.no_grad():
            self._outputs = self._function(*self._inputs)

    def outputs(self) -> list[Tensor]:
        return [t.float() if t.is_floating_point() else t for t in self._outputs]

    def in_force(self) -> str:
        return str(self._dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
