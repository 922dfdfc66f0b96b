"""Names for the functions that recorded calls go to, and back: only operators of torch, arithmetic, and our checks.

A plan is a file; what it may call is limited to functions that compute tensors and numbers.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from ...errors import GraphPruneError
from . import checks
from .safety import check_method

_SPACES: dict[str, Any] = {
    "torch": torch._C._VariableFunctions,
    **{f"torch._C.{n}": getattr(torch._C, n) for n in ("_nn", "_fft", "_linalg", "_special")},
}
_NO_OPERATORS = frozenset(("from_file", "frombuffer", "save"))  # they touch files and foreign memory
_ARITHMETIC = "add sub mul floordiv truediv mod pow neg getitem setitem".split()
_PLAIN: dict[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in _ARITHMETIC},
    "math.sqrt": math.sqrt,
    "builtins.getattr": builtins.getattr,
    **{f"graphprune.{n}": getattr(checks, n) for n in checks.__all__},
}


def name_of(function: Any) -> tuple[str, str] | None:
    """(op, target) for a function that a TorchFunctionMode was handed, or None for one that cannot be recorded."""
    name = getattr(function, "__name__", "")
    if function is torch.Tensor.__getitem__:
        return "call_function", "operator.getitem"
    if function is torch.Tensor.__setitem__:
        return "call_function", "operator.setitem"
    if name and getattr(torch.Tensor, name, None) is function:
        return "call_method", name
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "call_function", f"torch.ops.{str(function).replace('::', '.')}"
    for space, holder in _SPACES.items():
        if name not in _NO_OPERATORS and getattr(holder, name, None) == function:
            return "call_function", f"{space}.{name}"
    return None


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a name. Raises GraphPruneError for names that a plan has no business calling."""
    found: Any = _PLAIN.get(target)
    if found is not None:
        return found  # type: ignore[no-any-return]
    space, _, name = target.rpartition(".")
    if space in _SPACES and name not in _NO_OPERATORS and not name.startswith("__"):
        found = _visible(name) if space == "torch" else getattr(_SPACES[space], name, None)
    elif target.startswith("torch.ops."):
        found = torch.ops
        for step in target.split(".")[2:]:
            found = getattr(found, step, None) if step not in _NO_OPERATORS else None
        if not isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            found = None
    if found is None or not callable(found):
        raise GraphPruneError(f"the plan calls {target!r}, which is no operator of this torch {torch.__version__}")
    return found  # type: ignore[no-any-return]


@functools.cache
def _visible(name: str) -> Callable[..., Any] | None:
    """An operator of torch's own. Some have a Python function in front of them under the same name, with other
    arguments: torch.fx would print, and run, that one."""
    operator_: Any = getattr(torch._C._VariableFunctions, name, None)
    if operator_ is None or getattr(torch, name, None) is operator_:
        return operator_

    def call(*args: Any, **kwargs: Any) -> Any:
        return operator_(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"operator_{name}"
    return call


def method(name: str) -> str:
    """A tensor method by name, checked."""
    if not name.isidentifier() or not callable(getattr(torch.Tensor, name, None)):
        raise GraphPruneError(f"the plan calls the tensor method {name!r}, which torch {torch.__version__} has not")
    check_method(name)
    return name
