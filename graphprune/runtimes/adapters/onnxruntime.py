"""ONNX Runtime: ONNX files, in float32, float16 and (static, quantize-dequantize nodes) int8."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from ..arguments import FlatArguments
from ..providers import resolve_provider
from ..sessions import BoundSession, open_session
from .base import Adapter, Opening, Session
from .source import Source


class OnnxRuntime(Adapter):
    """See `base.Adapter`."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    suffix = ".onnx"
    form: ClassVar[Literal["onnx", "program"]] = "onnx"
    any_batch = True
    packages = (("onnxruntime", "onnxruntime"),)
    offered: ClassVar[Mapping[str, str]] = {"fp32": "as exported"}
    providers = ("cpu", "cuda", "tensorrt")

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        shutil.copyfile(source.onnx_file, path)
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        return _Opened(path, opening)


class _Opened(Session):
    def __init__(self, path: Path, opening: Opening) -> None:
        self._provider = resolve_provider(opening.provider or "cpu")
        self._session = open_session(path, self._provider, threads=opening.threads)
        self._names = opening.names
        self.load(opening.tensors)

    def load(self, tensors: Sequence[Tensor]) -> None:
        arguments = FlatArguments.of(dict(zip(self._names, tensors, strict=True)))
        self._bound = BoundSession(self._session, arguments, self._provider)

    def run(self) -> None:
        self._bound.run()

    def outputs(self) -> list[Tensor]:
        return self._bound.outputs()
