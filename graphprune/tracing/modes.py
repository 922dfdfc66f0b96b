"""The two modes that feed a recorder: calls as the user wrote them, and the ATen calls they become."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .origin import Expr, Literal, Operation, TensorSize, evaluate, is_traced, plain, recorded_value
from .recorder import Recorder
from .sizes import ACCOUNTED, READERS, SCALED, CallSizes, other_numbers, read_scalars, read_sizes

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
# Answers that are neither tensors nor sizes of them.
_ASKS = frozenset(("dim", "ndimension", "is_floating_point", "is_complex"))
# Values that leave torch are results: what becomes of them is out of sight.
_LEAVES = frozenset(("numpy", "tolist", "__array__", "__dlpack__"))
_SIZE_LIKE = frozenset(("view_as", "reshape_as", "expand_as"))
# Tensors that torch itself makes equally long.
_BROADCASTS = frozenset(("broadcast_tensors", "take_along_dim"))


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
        if name in _ASKS:
            return func(*args, **kwargs)
        if name in ("numel", "nelement"):
            return math.prod(recorder.traced_size(args[0], args[0].size()))
        if name in _LEAVES and isinstance(args[0], Tensor):
            recorder.left.append(recorder.node_of(args[0]))
        whole = WHOLE.get(func)
        before = recorder.sizes, recorder.scalars, recorder.function_name
        recorder.function_name = name
        recorder.scalars = read_scalars(name, args, kwargs) if name in SCALED else None
        counted = _counted(recorder, args) if name in _COMPARISONS else None
        if counted is None and name not in ACCOUNTED:
            for number in other_numbers(args, kwargs):
                recorder.guard("same", number.origin, Literal(plain(number)), True)
        if name in _SIZE_LIKE and len(args) > 1 and isinstance(args[1], Tensor):
            node = recorder.node_of(args[1])
            recorder.sizes = CallSizes("shape", tuple(TensorSize(node, a) for a in range(args[1].dim())), name)
        elif name in _BROADCASTS:
            recorder.sizes = _common_shape(recorder, name, [*args, *kwargs.values()])
        else:
            recorder.sizes = read_sizes(name, args, kwargs) if name in READERS else None
        try:
            if counted is not None:
                out = func(*args, **kwargs)
                _note_comparison(recorder, name, counted, args[1], out)
                return out
            out = recorder.run_short(func, args, kwargs)
            if out is not None:
                return out
            return func(*args, **kwargs) if whole is None else _run_whole(recorder, whole, func, args, kwargs)
        finally:
            recorder.sizes, recorder.scalars, recorder.function_name = before


def _run_whole(recorder: Recorder, target: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Make a call and record it as one of `target`, whatever parts it has."""
    recorder.whole_depth += 1
    try:
        out = func(*args, **kwargs)
        recorder.whole_depth -= 1
        if recorder.whole_depth == 0:
            recorder.record(*_whole_call(target, args, kwargs), out)
        return out
    except BaseException:
        recorder.whole_depth = 0
        raise


_COMPARISONS = frozenset(
    spelt for name in ("eq", "ne", "lt", "le", "gt", "ge") for spelt in (name, f"{name}_", f"__{name}__")
)


def _counted(recorder: Recorder, args: Any) -> Expr | None:
    """`(ids == image).sum() * x.shape[-1] == features.numel()`: the left side, a single integer of the input times a
    size, where it is compared with another size. None for every other comparison."""
    if len(args) != 2 or not is_traced(args[1]):
        return None
    product = args[0]
    if not isinstance(product, Tensor) or product.numel() != 1 or product.is_floating_point() or product.is_meta:
        return None
    node = recorder.node_of(product)
    scalars = node.meta.get("scalars") or {}
    if node.meta.get("operator") != "mul" or len(scalars) != 1 or len(node.all_input_nodes) != 1:
        return None
    (size,) = scalars.values()
    value, factor = recorder.unseen(lambda: int(product)), int(evaluate(size, recorded_value))
    return Operation("mul", (Literal(value // factor), size)) if factor else None


def _note_comparison(recorder: Recorder, name: str, counted: Expr, size: Any, out: Tensor) -> None:
    """A comparison of sizes like one of plain numbers: it must come out as it did."""
    recorder.guard(name.strip("_"), counted, size.origin, recorder.unseen(lambda: bool(out)))
    recorder.node_of(out).meta["compares_sizes"] = True


def _common_shape(recorder: Recorder, name: str, operands: list[Any]) -> CallSizes:
    """The longest of several tensors along every axis; along the one that `take_along_dim` picks from, each its own."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    tensors = [t for t in given if isinstance(t, Tensor)]
    ndim = max((t.dim() for t in tensors), default=0)
    own = next((v % ndim for v in operands[1:] if type(v) is int), ndim) if ndim else 0
    sizes: list[TensorSize | None] = []
    for axis in range(ndim):
        places = [(t, axis - ndim + t.dim()) for t in tensors]
        longest = max((p for p in places if p[1] >= 0), key=lambda p: int(p[0].shape[p[1]]))
        sizes.append(None if axis == own else TensorSize(recorder.node_of(longest[0]), longest[1]))
    return CallSizes("shape", tuple(sizes), name)


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
        return self.recorder.run(func, args, kwargs or {})
