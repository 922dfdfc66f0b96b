"""Runtimes by name: one adapter a file. `adapter(name)` finds one; what each must do is said in `base`."""

from __future__ import annotations

import functools
from typing import Any

from ...support.registry import Registry
from .base import PRECISIONS, Adapter, Opening, Session
from .executorch import ExecuTorch
from .litert import LiteRT
from .mnn import Mnn
from .ncnn import Ncnn
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .torch import Inductor, Torch

__all__ = ["PRECISIONS", "RUNTIMES", "Adapter", "Opening", "Session", "adapter"]

RUNTIMES: Registry[type[Adapter]] = Registry("runtime")
_KINDS = (OnnxRuntime, OpenVino, ExecuTorch, LiteRT, Ncnn, Mnn, Torch, Inductor)
for _kind in _KINDS:
    RUNTIMES.add(_kind.name, _kind)


def adapter(name: Any) -> Adapter:
    """The adapter of that name, one for the process.

    Raises:
        GraphPruneError: there is none; the nearest name and all others are said.
    """
    return _made(RUNTIMES.find(name))


@functools.cache
def _made(kind: type[Adapter]) -> Adapter:
    return kind()
