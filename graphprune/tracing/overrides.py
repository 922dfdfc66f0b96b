"""Make torch's Python-level functions transparent to a TorchFunctionMode.

`F.multi_head_attention_forward`, `Tensor.split` and others are written in Python. Under a TorchFunctionMode they hand
themselves over as a whole at their first line (`if has_torch_function(...)`), and their inside is no longer seen. While
recording we need the inside - that is where `view` and `shape` happen. So that first-line question is answered "no"
unless an argument really is a tensor subclass with an opinion of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._tensor
import torch.functional
import torch.nn.functional

from .origin import traced_float
from .patches import Patch

_MODULES = (torch.nn.functional, torch.functional, torch._tensor)
_ORDINARY = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)}
_NEUTRAL = {
    torch._C._disabled_torch_function_impl,
    getattr(torch.Tensor.__torch_function__, "__func__", torch.Tensor.__torch_function__),
}


def _own_opinion(values: Any) -> bool:
    if not torch._C._is_torch_function_enabled():
        return False
    for value in values:
        kind = type(value)
        if kind not in _ORDINARY and isinstance(value, torch.Tensor):
            implementation = getattr(kind, "__torch_function__", None)
            if getattr(implementation, "__func__", implementation) not in _NEUTRAL:
                return True
    return False


_ANSWERS: dict[str, Any] = {
    "has_torch_function": _own_opinion,
    "has_torch_function_unary": lambda value: _own_opinion((value,)),
    "has_torch_function_variadic": lambda *values: _own_opinion(values),
}


def _instead(answer: Any, original: Any) -> Any:
    return answer


# See the module's docstring.
PYTHON_FUNCTIONS_STAY_VISIBLE = (
    *(
        Patch(module, name, functools.partial(_instead, answer))
        for module in _MODULES
        for name, answer in _ANSWERS.items()
        if hasattr(module, name)
    ),
    Patch(torch.nn.functional, "float", lambda _: traced_float, whole=True),
)
