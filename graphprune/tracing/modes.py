"""The two modes that feed a recorder: calls as the user wrote them, and the ATen calls they become."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .origin import Literal, TensorSize, plain
from .recorder import Called, Recorder
from .sizes import CallSizes, other_numbers, read_scalars, read_sizes

aten = torch.ops.aten
# Recorded as the user called them: one node instead of the parts ATen makes of them on this device.
WHOLE: dict[Any, Any] = {
    torch.nn.functional.linear: aten.linear.default,
    torch.matmul: aten.matmul.default,
    torch.Tensor.matmul: aten.matmul.default,
    torch.Tensor.__matmul__: aten.matmul.default,
    torch.nn.functional.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.nn.functional.rms_norm: aten.rms_norm.default,
    torch.rms_norm: aten.rms_norm.default,
    torch._VF.lstm: aten.lstm.input,
    torch._VF.gru: aten.gru.input,
    torch._VF.rnn_tanh: aten.rnn_tanh.input,
    torch._VF.rnn_relu: aten.rnn_relu.input,
    torch._VF._pad_packed_sequence: aten._pad_packed_sequence.default,
}
_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_DATA_GETTER, _DATA_SETTER = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]
# Values that leave torch are results: what becomes of them is out of sight.
_LEAVES = frozenset(("numpy", "tolist", "__array__", "__dlpack__"))
_SIZE_LIKE = frozenset(("view_as", "reshape_as", "expand_as"))


class FunctionMode(TorchFunctionMode):
    """Sees calls as the user wrote them: reads sizes with their history and hands out traced sizes."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return _property(recorder, func, args, kwargs)
        if name == "__set__" and func == _DATA_SETTER and isinstance(args[1], Tensor):
            return recorder.assign(args[0], args[1], lambda: func(*args, **kwargs))
        if name == "size":
            return _size(recorder, func, args, kwargs)
        if name in ("numel", "nelement"):
            return math.prod(recorder.traced_size(args[0], args[0].size()))
        if name in _LEAVES and isinstance(args[0], Tensor):
            recorder.left.append(recorder.node_of(args[0]))
        whole = WHOLE.get(func)
        before = recorder.sizes, recorder.scalars, recorder.function_name
        recorder.function_name = name
        recorder.scalars = read_scalars(name, args, kwargs)
        for number in other_numbers(name, args, kwargs):
            recorder.guard("same", number.origin, Literal(plain(number)), True)
        if name in _SIZE_LIKE and len(args) > 1 and isinstance(args[1], Tensor):
            node = recorder.node_of(args[1])
            recorder.sizes = CallSizes("shape", tuple(TensorSize(node, a) for a in range(args[1].dim())), name)
        else:
            recorder.sizes = read_sizes(name, args, kwargs)
        if whole is None:
            try:
                return func(*args, **kwargs)
            finally:
                recorder.sizes, recorder.scalars, recorder.function_name = before
        recorder.whole_depth += 1
        try:
            out = func(*args, **kwargs)
            recorder.whole_depth -= 1
            if recorder.whole_depth == 0:
                recorder.record(*_whole_call(whole, args, kwargs), out)
            return out
        except BaseException:
            recorder.whole_depth = 0
            raise
        finally:
            recorder.sizes, recorder.scalars, recorder.function_name = before


def _whole_call(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    # RNNs on packed sequences call the same function with (data, batch_sizes, hx, ...)
    if target in (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input) and isinstance(
        args[1], Tensor
    ):
        if not isinstance(args[2], (bool, list)) or target is aten.lstm.input:
            target = target.overloadpacket.data
    return target, *_in_order(target, args, kwargs)


def _in_order(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments that the user named move to their positions, where ATen's own calls have them and rules look."""
    placed, named = list(args), dict(kwargs)
    for argument in target._schema.arguments[len(args) :]:
        name = "input" if argument.name == "self" else argument.name
        if argument.kwarg_only or name not in named:
            break
        placed.append(named.pop(name))
    return tuple(placed), named


def _property(recorder: Recorder, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if func == _SHAPE_GETTER:
        return recorder.traced_size(args[0], out)
    if func == _DATA_GETTER:
        recorder.same(args[0], out)
    return out


def _size(recorder: Recorder, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if isinstance(out, torch.Size):
        return recorder.traced_size(args[0], out)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if type(out) is int and isinstance(dim, int):
        return recorder.session.whole(out, TensorSize(recorder.node_of(args[0]), int(dim) % args[0].dim()))
    return out


class DispatchMode(TorchDispatchMode):
    """Sees the ATen calls."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        called = Called.of(func)
        if called.random:
            recorder.drew = True
        if called.writes:
            recorder.before_write(func, args, kwargs)
        out = called.shape(*args) if called.shape is not None and recorder.shapes_only and not kwargs else None
        if out is None:
            out = func(*args, **kwargs)
        if recorder.whole_depth == 0:
            recorder.record(func, args, kwargs, out)
        return out
