"""Common calls of torch functions as the ATen calls they become, without going through torch.

Where a run is recorded without data, torch would be asked for nothing but a shape (`shapes.py`), and on its way to the
ATen call it takes longer than all that is recorded of it. So what it would do is said here: `ATEN` gives, for a torch
function, the ATen call of the arguments at hand, or None where torch has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .origin import plain

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...]]  # operator and arguments
_PLAIN_TENSORS = (Tensor, nn.Parameter)


def are_plain(values: Sequence[Any]) -> bool:
    """Whether tensors among these are torch's own, and without data."""
    return all(type(v) in _PLAIN_TENSORS and v.is_meta for v in values if isinstance(v, Tensor))


def nothing_between() -> bool:
    """Whether torch would do nothing else on the way: take gradients, vectorise, make tensors for inference alone, or
    ask a mode of the user's."""
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 1
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _alone(target: Any) -> Callable[..., Call | None]:
    """Of one tensor and nothing else."""
    return lambda *args: (target, args) if len(args) == 1 else None


def _pair(target: Any) -> Callable[..., Call | None]:
    """Of two tensors and nothing else."""

    def call(*args: Any) -> Call | None:
        return (target, args) if len(args) == 2 and isinstance(args[1], Tensor) else None

    return call


def _hardtanh(target: Any) -> Callable[..., Call | None]:
    def call(x: Any, low: Any, high: Any) -> Call | None:
        return (target, (x, low, high)) if type(low) is type(high) is float else None

    return call


def _gelu(x: Any, *, approximate: str = "none") -> Call | None:
    return (aten.gelu.default, (x,)) if approximate == "none" else None


def _convolution(spatial: int) -> Callable[..., Call | None]:
    def per_axis(value: Any) -> list[int] | None:
        values = [value] * spatial if isinstance(value, int) else value
        if not isinstance(values, (tuple, list)) or len(values) not in (1, spatial):
            return None
        return [plain(v) for v in values] * (spatial if len(values) < spatial else 1)

    def call(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
    ) -> Call | None:
        numbers = [per_axis(value) for value in (stride, padding, dilation)]
        if None in numbers or not isinstance(weight, Tensor) or weight.dim() != spatial + 2:
            return None
        return aten.convolution.default, (x, weight, bias, *numbers, False, [0] * spatial, plain(groups))

    return call


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: Any, momentum: Any, eps: Any, cudnn: Any
) -> Call | None:
    """With stored statistics that fit the tensor."""
    if training or mean is None or variance is None or x.dim() < 2 or not x.is_floating_point():
        return None
    channels = x.shape[1:2]
    for tensor in (weight, bias, mean, variance):
        if tensor is not None and (tensor.shape != channels or tensor.dtype is not x.dtype):
            return None
    return aten.native_batch_norm.default, (x, weight, bias, mean, variance, False, float(momentum), float(eps))


def _layer_norm(
    x: Any, sizes: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn: Any = True
) -> Call | None:
    if not isinstance(sizes, (tuple, list)):
        return None
    return aten.native_layer_norm.default, (x, [plain(n) for n in sizes], weight, bias, float(eps))


def _linear(*args: Any) -> Call:
    return aten.linear.default, args


def _cat(tensors: Any, dim: Any = 0) -> Call | None:
    if not isinstance(tensors, (tuple, list)) or not isinstance(dim, int) or not are_plain(tensors):
        return None
    axis = plain(dim)
    return aten.cat.default, (list(tensors), axis) if axis else (list(tensors),)


_F = torch._C._nn
ATEN: dict[Any, Callable[..., Call | None]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.batch_norm: _batch_norm,
    torch.layer_norm: _layer_norm,
    torch.cat: _cat,
    _F.linear: _linear,
    torch.relu: _alone(aten.relu.default),
    torch.relu_: _alone(aten.relu_.default),
    torch.sigmoid: _alone(aten.sigmoid.default),
    Tensor.sigmoid: _alone(aten.sigmoid.default),
    _F.silu: _alone(aten.silu.default),
    _F.silu_: _alone(aten.silu_.default),
    _F.hardswish: _alone(aten.hardswish.default),
    _F.hardswish_: _alone(aten.hardswish_.default),
    _F.hardsigmoid: _alone(aten.hardsigmoid.default),
    _F.hardtanh: _hardtanh(aten.hardtanh.default),
    _F.hardtanh_: _hardtanh(aten.hardtanh_.default),
    _F.gelu: _gelu,
    Tensor.add: _pair(aten.add.Tensor),
    Tensor.add_: _pair(aten.add_.Tensor),
    Tensor.mul: _pair(aten.mul.Tensor),
    Tensor.mul_: _pair(aten.mul_.Tensor),
}
