"""Networks run in another precision than their own, whatever their code says about data types."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import GraphPruneError
from ...support.reach import reachable
from ...support.walking import named_tensors
from ..surgery import clone_with

HALF = (torch.float16, torch.bfloat16)
_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


class Computing(TorchDispatchMode):
    """While it is on, every floating-point number of every call is in `dtype`: tensors that come in another are
    converted, and a type that the code asks for (`.half()`, `zeros(..., dtype=torch.bfloat16)`, autocast) is `dtype`.
    Complex numbers alike.

    In float64 numbers are not rounded to the grid of a quantisation that is trained for: which way the last bit of a
    sum decides, and torch has the operators in float32 alone.

    Where the code looks at the bits of floating-point numbers it raises GraphPruneError.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.complex = dtype, _COMPLEX.get(dtype, torch.complex64)

    def wanted(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_floating_point:
            return self.dtype
        return self.complex if dtype.is_complex else dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype and (args[0].is_floating_point() or args[1].is_floating_point):
            raise GraphPruneError("the bits of floating-point numbers are looked at, which depend on the precision")
        if self.dtype is torch.float64 and _to_grid(func):
            mask = torch.ones_like(args[0], dtype=torch.bool)
            return (args[0].clone(), mask) if len(func._schema.returns) == 2 else args[0].clone()
        values: list[Any] = [*args, *(kwargs or {}).values()]
        # what is written into keeps its type, and takes what is written
        written = [t for place in _written(func) for t in _tensors(_argument(func, place, args, kwargs or {}))]
        kept = next((t.dtype for t in written if self.wanted(t.dtype) is not t.dtype), None)
        if kept is None and not any(map(self._foreign, tree_leaves(values))):
            return func(*args, **(kwargs or {}))

        def converted(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return self.wanted(value)
            if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                return value
            if kept is not None:
                return value.to(kept) if value.is_complex() is kept.is_complex else value
            return value.to(self.wanted(value.dtype))

        args, kwargs = tree_map(converted, args), tree_map(converted, kwargs or {})
        if func in _HALF_TO_FLOAT:
            args = (*args[:2], False)
        return func(*args, **kwargs)

    def _foreign(self, value: Any) -> bool:
        dtype = value if isinstance(value, torch.dtype) else value.dtype if isinstance(value, Tensor) else None
        return dtype is not None and self.wanted(dtype) is not dtype


_HALF_TO_FLOAT = (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)


def _to_grid(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith("fake_quantize") or "fake_quant" in name or "_obs_fq_helper" in name


def _tensors(value: Any) -> list[Tensor]:
    found = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return [t for t in found if t.is_floating_point() or t.is_complex()]


def _argument(func: Any, place: tuple[int, str], args: Any, kwargs: Any) -> Any:
    return args[place[0]] if place[0] < len(args) else kwargs.get(place[1])


def _look(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    arguments = enumerate(schema.arguments) if schema is not None else ()
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


_written: Callable[[Any], tuple[tuple[int, str], ...]] = functools.lru_cache(maxsize=4096)(_look)


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating-point tensors, also those that plain attributes lead to, are in `dtype`."""
    tensors = {n: t.detach().to(dtype) for n, t in named_tensors(model).items() if _of_another(t, dtype)}
    copy = clone_with(model, tensors)
    known = {id(t) for t in named_tensors(copy).values()}
    for tensor in reachable(copy):
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and id(tensor) not in known
        if plain and _of_another(tensor, dtype) and tensor.layout is torch.strided and not tensor.is_inference():
            tensor.data = tensor.data.to(dtype)
    return copy


def _of_another(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not dtype


def precision_of(tensors: Iterable[Tensor]) -> torch.dtype:
    """The coarsest floating-point type among tensors that are computed with; float32 where there is none."""
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
