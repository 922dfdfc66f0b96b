"""Execution providers of ONNX Runtime: which of them really load on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
import sys
from typing import Any

from ..errors import GraphPruneError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_SHORT = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
_NVIDIA = frozenset({CUDA, TENSORRT, "NvTensorRTRTXExecutionProvider"})


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider that loads here. `note` says why it was chosen, where that was not the caller's choice."""

    name: str
    note: str | None = None

    @property
    def device(self) -> str:
        """Where its tensors live, in ONNX Runtime's words: "cuda" or "cpu"."""
        return "cuda" if self.name in _NVIDIA else "cpu"

    def __str__(self) -> str:
        return self.name


def runtime() -> Any:
    """The module `onnxruntime`, imported when first needed.

    Raises:
        GraphPruneError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise GraphPruneError(
            f"ONNX Runtime cannot be imported ({error}): pip install onnxruntime, or onnxruntime-gpu for CUDA"
        ) from error
    return onnxruntime


def resolve_provider(provider: str | Provider = "auto") -> Provider:
    """The execution provider to use: "auto", "cpu", "cuda", "tensorrt" or a full name of ONNX Runtime.

    "auto" is CUDA if it really loads (a small session is created and run: a build with CUDA lists the provider
    on every machine, and falls back to the CPU in silence), else the CPU; `note` says which and why.

    Raises:
        GraphPruneError: the provider does not load here; those that do are named.
    """
    if isinstance(provider, Provider):
        return provider
    if not isinstance(provider, str):
        raise GraphPruneError(f"provider: expected a name such as 'auto', 'cpu' or 'cuda', got {provider!r}")
    if provider.lower() == "auto":
        problem = why_not(CUDA)
        if problem is None:
            return Provider(CUDA, f"provider 'auto': {CUDA} loads here and is used")
        return Provider(CPU, f"provider 'auto': {CUDA} is not usable here ({problem}); {CPU} is used")
    known = {name.lower(): name for name in runtime().get_available_providers()}
    name = _SHORT.get(provider.lower(), known.get(provider.lower(), provider))
    problem = why_not(name)
    if problem is not None:
        raise GraphPruneError(
            f"provider {provider!r} is not usable here ({problem}); usable are {', '.join(usable_providers())}"
        )
    return Provider(name)


def usable_providers() -> list[str]:
    """The providers of this build of ONNX Runtime that load on this machine, in its order of preference."""
    return [name for name in runtime().get_available_providers() if why_not(name) is None]


@functools.cache
def why_not(name: str) -> str | None:
    """None if the provider `name` loads and runs a node on this machine, else the reason. Asked once per process."""
    onnxruntime = runtime()
    if name not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} has no provider of that name"
    if name == CPU:
        return None
    if name in _NVIDIA:
        # Without the driver the attempt can only fail, and its complaints come from C++, past Python's streams.
        problem = _nvidia_driver_problem()
        if problem is not None:
            return problem
        preload = getattr(onnxruntime, "preload_dlls", None)
        if preload is not None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
                preload()
    return _attempt(name)


def _nvidia_driver_problem() -> str | None:
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
            return "the NVIDIA driver finds no GPU"
    except (OSError, AttributeError):
        return f"no NVIDIA driver: {library} cannot be loaded"
    return None


def _attempt(name: str) -> str | None:
    """Create a session with this provider alone and run one node."""
    import numpy as np

    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.set_default_logger_severity(4)
        try:
            session = onnxruntime.InferenceSession(
                _tiny_model(), options, providers=[name], enable_fallback=0
            )
            used = session.get_providers()
            if used[0] != name:
                return "its libraries cannot be loaded"
            result = session.run(None, {"x": np.ones((2, 2), dtype=np.float32)})[0]
        finally:
            onnxruntime.set_default_logger_severity(2)
    except Exception as error:
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None if np.array_equal(result, np.full((2, 2), 2.0)) else "it computed 1 + 1 wrong"


def _tiny_model() -> bytes:
    from onnx import TensorProto, helper

    shape = [2, 2]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
