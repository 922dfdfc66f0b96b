"""Run a network and see what chosen layers read and make; stop as soon as everything asked for was seen."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import GraphPruneError
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.operators import (
    Declared,
    Layer,
    Matrices,
    Merge,
    Operator,
    Sliding,
    argument,
    function_name,
    named,
    positions,
)
from ...tracing.state import evaluating, unfused
from ...tracing.trace import run_model
from .data import refuse_infinite
from .layers import Reader
from .picks import TELL, Rows, follow, picking, rows_in
from .replay import Diverged, Replay


@dataclasses.dataclass
class Call:
    """One call of a layer. `x`, `y`: what it read and made; `other`: what `y` was then added to, where asked for.

    `geometry`: (stride, padding, dilation, output padding) of a convolution, a number per axis; padding may be "same",
    and output padding is for transposed ones. `again`: of a user's operator, what it makes of the same data with
    another weight, and with one number for all of the bias; kept with `x`. `rows`: which rows `x` holds, where they
    were picked by value.
    """

    x: Tensor | None
    y: Tensor | None
    other: Tensor | None = None
    geometry: tuple[Any, Any, Any, Any] | None = None
    again: Callable[[Tensor, float], Tensor] | None = None
    rows: Rows | None = None


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
        self.following = outputs and (replay is None or not replay.replaying)
        self.picked, self.told = False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        operator = named(name)
        if self.waiting and operator is not None and operator.merge is Merge.SUM and len(args) == 2:
            with self._aside():
                self._addition(args)
        found = None
        if operator is not None:
            with self._aside():
                found = self._call_of(operator, func, name, args, kwargs)
        out = self._made(func, name, args, kwargs)
        if self.following:
            with self._aside():
                self._follow(func, name, args, kwargs, out)
        if found is None:
            self._check()
            return out
        reader, call = found
        # copies, because what follows may write in place
        with self._aside():
            call.y = out.clone() if self.outputs else None
        self.calls[reader.weight].append(call)
        if reader.adds and self.additions:
            self.waiting.append((out, call))
        self.missing -= 1
        self._check()
        return out

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.replay is None else self.replay.aside()

    def _made(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of a call, from memory where it is settled."""
        if self.replay is None:
            return func(*args, **kwargs)
        readers = self.replay.reader_names(name, args, kwargs)
        if readers:
            return self.replay.layer(readers, func, args, kwargs)
        out = func(*args, **kwargs)
        self.replay.told(func, name, args, kwargs, out)
        return out

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Which rows results hold."""
        self.told = self.told or name in TELL
        by = picking(name, args, kwargs, self.told)
        if by and self.replay is not None:
            self.replay.picked(by)
        self.picked = self.picked or bool(by)
        if self.picked:
            follow(name, func, args, kwargs, out, by)

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

    def _call_of(
        self, operator: Operator, func: Any, name: str, args: Any, kwargs: Any
    ) -> tuple[Reader, Call] | None:
        form = operator.form
        geometry = None
        if isinstance(form, Declared):
            return self._declared(func, name, args, kwargs)
        if not isinstance(form, (Layer, Matrices, Sliding)):
            return None
        target = func if positions(func) else getattr(torch.ops.aten, name, None)
        places = (form.left, form.left + 1) if isinstance(form, Matrices) else (form.data, form.weight)
        if getattr(func, "__name__", "") == "__rmatmul__":
            places = places[::-1]
        x, weight = (argument(target, args, kwargs, place) for place in places)
        reader = self.weights.get(id(weight))
        if reader is None or reader.declared:
            return None
        if isinstance(form, Sliding):
            geometry = _geometry(form, lambda place: argument(target, args, kwargs, place), weight.dim() - 2)
        return reader, Call(x.clone() if self.inputs else None, None, None, geometry, rows=rows_in(x))

    def _declared(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Reader, Call] | None:
        given = [*args, *kwargs.values()]
        reader = next((self.weights[id(a)] for a in given if id(a) in self.weights), None)
        if reader is None or reader.declared != name:
            return None
        x = argument(func, args, kwargs, reader.places.data)
        if not self.inputs:
            return reader, Call(None, None, rows=rows_in(x))
        held = x.clone()
        return reader, Call(held, None, again=_repeated(func, args, kwargs, reader, held), rows=rows_in(x))


def refuse_infinite_call(reader: Reader, call: Call, index: int, whose: str = "the model") -> None:
    """Raise GraphPruneError where a layer read or made something that is not finite, on batch `index` of data."""
    for values, verb in ((call.x, "reads"), (call.y, "makes")):
        if values is not None:
            refuse_infinite(values, f"on batch {index}, {reader.weight} of {whose} {verb}")


def _geometry(form: Sliding, given: Callable[[int], Any], axes: int) -> tuple[Any, Any, Any, Any]:
    def number(place: int | None, default: int) -> Any:
        value = None if place is None else given(place)
        return value if isinstance(value, str) else _many(default if value is None else value, axes)

    extra = number(form.output_padding, 0)
    return number(form.stride, 1), number(form.padding, 0), number(form.dilation, 1), extra


def _repeated(func: Any, args: Any, kwargs: Any, reader: Reader, x: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The same call with another weight and bias."""
    places = reader.places
    names = positions(func)
    bound = {place: (value.clone() if isinstance(value, Tensor) else value) for place, value in enumerate(args)}
    bound |= {names[key]: (value.clone() if isinstance(value, Tensor) else value) for key, value in kwargs.items()}
    schema = list(names)

    def again(weight: Tensor, bias: float) -> Tensor:
        values = {**bound, places.data: x, places.weight: weight}
        if places.bias is not None:
            values[places.bias] = x.new_full((weight.shape[reader.out_axis],), bias)
        by_place = [values.pop(place) for place in range(len(args))]
        out: Tensor = func(*by_place, **{schema[place]: value for place, value in values.items()})
        return out

    return again


def data_place(function: Any, reader: Reader) -> int:
    """The place of what a layer reads among the arguments of a call of it."""
    operator = named(function_name(function))
    form = None if operator is None else operator.form
    if isinstance(form, Matrices):
        return form.left
    return form.data if isinstance(form, (Layer, Sliding)) else max(reader.places.data, 0)


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
    weights = named_tensors(model)

    def seen(memory: Replay | None) -> dict[str, list[Call]]:
        watch = _Watch({id(weights[r.weight]): r for r in readers}, inputs, outputs, additions, memory)
        with (
            evaluating(model),
            unfused(),
            contextlib.suppress(_Enough),
            contextlib.nullcontext() if memory is None else memory.watching(),
            watch,
        ):
            run_model(model, example.clone(), "data")
        return watch.calls

    if replay is None or not replay.usable:
        return seen(None)
    replaying = replay.replaying
    try:
        calls = seen(replay)
        replay.finish()
        return calls
    except (Diverged, GraphPruneError):
        if not replaying:
            raise
        replay.drop()
        return seen(None)
