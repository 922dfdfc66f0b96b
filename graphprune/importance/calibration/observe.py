"""Run a network and see what chosen layers read and make; stop as soon as everything asked for was seen."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.state import evaluating, unfused
from ...tracing.trace import run_model
from .layers import Reader
from .replay import Replay

_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
_CONVOLUTIONS: dict[Any, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}
_PRODUCTS = frozenset(("mm", "matmul", "__matmul__"))
_ADDITIONS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))


@dataclasses.dataclass
class Call:
    """One call of a layer. `x`, `y`: what it read and made; `other`: what `y` was then added to, where asked for.

    `geometry`: (stride, padding, dilation, output padding) of a convolution, a number per axis; padding may be "same",
    and output padding is for transposed ones.
    """

    x: Tensor | None
    y: Tensor | None
    other: Tensor | None = None
    geometry: tuple[Any, Any, Any, Any] | None = None


class _Enough(BaseException):
    """Unwinds the user's forward."""


class _Watch(TorchFunctionMode):
    def __init__(
        self, weights: Mapping[int, Reader], inputs: bool, outputs: bool, additions: bool, replay: Replay | None
    ) -> None:
        super().__init__()
        self.replay = replay
        self.weights, self.inputs, self.outputs, self.additions = weights, inputs, outputs, additions
        self.calls: dict[str, list[Call]] = {r.weight: [] for r in weights.values()}
        self.missing = sum(r.calls for r in weights.values())
        self.waiting: list[tuple[Tensor, Call]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # without the overload of an ATen call
        number = 0
        if self.replay is not None:
            number, known, out = self.replay.enter(args, kwargs)
            if known:
                self._check()
                return out
        if self.waiting and name in _ADDITIONS and len(args) == 2:
            self._addition(args)
        found = self._call_of(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if self.replay is not None:
            self.replay.leave(number, name, args, kwargs, out, self._name(args))
        if found is None:
            self._check()
            return out
        reader, call = found
        # copies, because what follows may write in place
        call.y = out.clone() if self.outputs else None
        self.calls[reader.weight].append(call)
        if reader.adds and self.additions:
            self.waiting.append((out, call))
        self.missing -= 1
        self._check()
        return out

    def _addition(self, args: Any) -> None:
        for i, (made, call) in enumerate(self.waiting):
            if args[0] is made or args[1] is made:
                other = args[1] if args[0] is made else args[0]
                if isinstance(other, Tensor) and other.shape == made.shape:
                    call.other = other.clone()
                del self.waiting[i]
                self._check()
                return

    def _check(self) -> None:
        if not self.missing and not self.waiting and (self.replay is None or self.replay.done):
            raise _Enough

    def _name(self, args: Any) -> str | None:
        """The reader that a call belongs to, whether or not it is watched now."""
        assert self.replay is not None
        found = (self.replay.names.get(id(a)) for a in args if isinstance(a, nn.Parameter))
        return next((n for n in found if n is not None), None)

    def _call_of(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Reader, Call] | None:
        if func in _LINEAR:
            x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            geometry = None
        elif func in _CONVOLUTIONS:
            x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
            transposed = "transpose" in name
            stride = _argument(args, kwargs, 3, "stride", 1)
            padding = _argument(args, kwargs, 4, "padding", 0)
            dilation = _argument(args, kwargs, 7 if transposed else 5, "dilation", 1)
            n = _CONVOLUTIONS[func]
            padding = padding if isinstance(padding, str) else _many(padding, n)
            extra = _argument(args, kwargs, 5, "output_padding", 0) if transposed else 0
            geometry = (_many(stride, n), padding, _many(dilation, n), _many(extra, n))
        elif func is torch.ops.aten.convolution.default:  # in modules that are graphs of recorded calls
            x, weight = args[:2]
            stride, padding, dilation, extra = (_many(a, weight.dim() - 2) for a in (*args[3:6], args[7]))
            geometry = stride, padding, dilation, extra
        elif name in _PRODUCTS and len(args) == 2:
            (x, weight), geometry = args, None
        elif name == "addmm" and len(args) == 3:
            (_, x, weight), geometry = args, None
        else:
            return None
        reader = self.weights.get(id(weight))
        if reader is None:
            return None
        return reader, Call(x.clone() if self.inputs else None, None, None, geometry)


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any = None) -> Any:
    return args[position] if position < len(args) else kwargs.get(name, default)


def _many(value: Any, n: int) -> tuple[int, ...]:
    items = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return items * n if len(items) == 1 else items


def observe(
    model: nn.Module,
    readers: Sequence[Reader],
    example: ExampleInput,
    *,
    inputs: bool = False,
    outputs: bool = False,
    additions: bool = False,
    replay: Replay | None = None,
) -> dict[str, list[Call]]:
    """The calls of `readers` in one run of `model` (eval mode, no gradients), by weight name.

    `inputs`, `outputs`: what to keep of each call; `additions`: also what the result was added to, for readers with
    `adds`. The run ends early when every call has been seen. A layer that this input does not reach has no calls.
    `replay`, begun for these readers, remembers what need not be computed again.

    Raises GraphPruneError when the model fails on the batch.
    """
    named = named_tensors(model)
    watch = _Watch({id(named[r.weight]): r for r in readers}, inputs, outputs, additions, replay)

    def run() -> None:
        with watch:
            run_model(model, example.clone(), "data")

    _quietly(model, run)
    if replay is not None:
        replay.finish()
    return watch.calls


def _quietly(model: nn.Module, run: Callable[[], None]) -> None:
    with evaluating(model), unfused(), contextlib.suppress(_Enough):
        run()
