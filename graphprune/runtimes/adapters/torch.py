"""PyTorch itself: a `torch.export` program, run as it is ("torch") or compiled by inductor ("inductor")."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import GraphPruneError
from .base import Adapter, Opening, Session
from .dtypes import converted
from .naming import first_lines
from .source import Source

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Where the time goes: what is asked for has to be in force there.
_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "attention", "lstm", "gru", "rnn")


class Torch(Adapter):
    """See `base.Adapter`."""

    name = "torch"
    title = "PyTorch"
    suffix = ".pt2"
    form: ClassVar[Literal["onnx", "program"]] = "program"
    any_batch = True
    packages = (("torch", "torch"),)
    offered: ClassVar[Mapping[str, str]] = {
        "fp32": "as exported",
        "bf16": "the file of fp32; weights, activations and inputs in bfloat16",
        "fp16": "the file of fp32; weights, activations and inputs in float16",
    }
    refused: ClassVar[Mapping[str, str]] = {
        "int8": "PyTorch runs quantised programs in float32 unless inductor compiles them, and its quantiser refuses "
        "networks that use one ReLU module twice; use onnxruntime or openvino",
    }

    def write(self, source: Source, precision: str, path: Path) -> Sequence[str]:
        assert source.program is not None
        shutil.copyfile(source.program, path)
        if not _has_kernels(precision):
            return (f"oneDNN has no kernels in {_name(_DTYPES[precision])} for this CPU: most of it runs slower than "
                    f"in float32",)  # fmt: skip
        return ()

    def open(self, path: Path, opening: Opening) -> Session:
        try:
            module = torch.export.load(path).module()
        except Exception as error:
            raise GraphPruneError(f"{path.name} is no program of torch.export: {first_lines(error)}") from error
        # Before anything is compiled, which has the number of threads built in.
        torch.set_num_threads(opening.threads)
        return _Opened(self, converted(module, _DTYPES[opening.precision]), opening)

    def compiled(self, module: Any) -> Callable[..., Any]:
        """What is called to run it."""
        found: Callable[..., Any] = module
        return found


class Inductor(Torch):
    """See `base.Adapter`. `torch.compile` with its defaults, for the shapes that the file is opened with."""

    name = "inductor"
    title = "PyTorch (inductor)"

    def unable(self) -> str | None:
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            return "inductor compiles C++ and finds no compiler: install g++ or clang++"
        return None

    def compiled(self, module: Any) -> Callable[..., Any]:
        return torch.compile(module, backend="inductor", fullgraph=True, dynamic=False)


class _Opened(Session):
    def __init__(self, adapter: Torch, module: Any, opening: Opening) -> None:
        self._title, self._precision = adapter.title, opening.precision
        self._dtype = _DTYPES[opening.precision]
        self.load(opening.tensors)
        seen = _Products()
        self._function = module
        with seen:
            self._first("run")
        self._in_force = seen.text(self._dtype) + ("" if _has_kernels(opening.precision) else ", not by oneDNN")
        self._function = adapter.compiled(module)
        if self._function is not module:
            self._first("compile")

    def _first(self, what: str) -> None:
        try:
            self.run()
        except Exception as error:
            raise GraphPruneError(
                f"{self._title} cannot {what} the program in {_name(self._dtype)}: {first_lines(error)}"
            ) from error

    def load(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = [t.to(self._dtype if t.is_floating_point() else t.dtype, copy=True) for t in tensors]

    def run(self) -> None:
        with torch.no_grad():
            self._outputs = self._function(*self._inputs)

    def outputs(self) -> list[Tensor]:
        return [t.float() if t.is_floating_point() else t for t in self._outputs]

    def in_force(self) -> str:
        return self._in_force


class _Products(TorchDispatchMode):
    """Counts the dtypes of convolutions and matrix products: constants of a program stay in float32, and what they are
    added to becomes that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rsplit("::", 1)[-1].strip("_")
        if name.endswith(_PRODUCTS):
            first = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(first, Tensor) and first.is_floating_point():
                self._dtypes[first.dtype] += 1
        return result

    def text(self, wanted: torch.dtype) -> str:
        """The dtype that is wanted, and how far it is in force where it is not everywhere."""
        total = self._dtypes.total()
        if self._dtypes[wanted] == total:
            return _name(wanted)
        return f"{_name(wanted)} in {self._dtypes[wanted]} of {total} convolutions and matrix products"


def _has_kernels(precision: str) -> bool:
    """Whether oneDNN has them for this CPU; where it cannot be asked, nothing is said against it."""
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None) if precision != "fp32" else None
    return asked is None or bool(asked())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
