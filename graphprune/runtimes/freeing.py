"""Capturing a model with free axes, and the calls at other sizes that its file is tried with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import GraphPruneError
from .arguments import FlatArguments, named_outputs
from .capture import FixedAxesError, capture, reason_of, run_model
from .dynamic import FreeAxes
from .sizes import Relations, complete, in_words, other_sizes, relations, shapes_at


@dataclasses.dataclass(frozen=True)
class Call:
    """A call at certain sizes of the free dims. `where`: the sizes in words, for messages."""

    sizes: Mapping[str, int]
    arguments: FlatArguments

    @property
    def where(self) -> str:
        """ " at batch 2, length 13"; nothing where no axis is free."""
        batch = self.arguments.batch_size
        if not self.sizes:
            return "" if batch is None else f" at batch size {batch}"
        return f" at batch size {self.sizes['batch']}" if [*self.sizes] == ["batch"] else f" at {in_words(self.sizes)}"


@dataclasses.dataclass(frozen=True)
class Captured:
    """A program, the axes that are free in it, and the calls to compare it with the model at, the example's first.

    `perhaps`: calls at sizes of 0 and 1, which the model takes and the file need not: torch promises nothing of these.
    """

    program: Any
    free: FreeAxes
    calls: tuple[Call, ...]
    perhaps: tuple[Call, ...] = ()
    notes: tuple[str, ...] = ()


def capture_batched(
    model: nn.Module, arguments: FlatArguments, names: Sequence[str], *, opset: int | None, free: FreeAxes
) -> Captured:
    """With a free batch, or none. Call inside `inference_state`."""
    batch = arguments.batch_size
    if not free.any or batch is None:
        program = capture(model, arguments, names, opset=opset, free=free)
        return Captured(program, free, (Call({}, arguments),))
    # A batch of 1 means more than a size to torch (it broadcasts), so another one is traced.
    traced = arguments.resized(2) if batch == 1 else arguments
    if traced is not arguments:
        run_model(model, traced)
    program = capture(model, traced, names, opset=opset, free=free)
    other = 3 if batch == 1 else batch + 1  # one that was not traced either
    calls = (Call({"batch": batch}, arguments), Call({"batch": other}, arguments.resized(other, seed=1)))
    return Captured(program, free, calls)


def capture_free(
    model: nn.Module, arguments: FlatArguments, names: Sequence[str], *, opset: int | None, free: FreeAxes
) -> Captured:
    """With the axes that `dynamic_shapes` says. Call inside `inference_state`.

    Raises:
        GraphPruneError: an axis is fixed by the model's code; it takes no other size of those that were tried.
    """
    traced = _traced(model, arguments, free)
    while True:
        try:
            program = capture(model, traced, names, opset=opset, free=free)
            break
        except FixedAxesError as error:
            hard = [(i, axis) for i, axis in error.places if not free.axes[i][axis].optional]
            if hard:
                raise GraphPruneError(_fixed(model, arguments, free, hard)) from error
            free = free.without(error.places)
    found = relations(program, free, traced)
    own = Call(free.sizes(arguments.tensors), arguments)
    calls, notes = _other_calls(model, arguments, free, found)
    perhaps = _least_calls(model, arguments, free, found, [own, *calls])
    return Captured(program, free, (own, *calls), tuple(perhaps), (*found.notes, *notes))


def _traced(model: nn.Module, arguments: FlatArguments, free: FreeAxes) -> FlatArguments:
    """The example with at least 2 in every free axis, if the model takes it: 0 and 1 mean more than sizes to torch."""
    sizes = free.sizes(arguments.tensors)
    if all(size > 1 for size in sizes.values()):
        return arguments
    larger = {name: max(size, 2 + i) if size < 2 else size for i, (name, size) in enumerate(sizes.items())}
    try:
        shapes = shapes_at(free, arguments, larger)
        other = arguments.shaped(shapes, seed=1)
        run_model(model, other)
    except (GraphPruneError, TypeError):  # sizes that are tied to one another in a way that only torch knows
        return arguments
    return other


def _other_calls(
    model: nn.Module, arguments: FlatArguments, free: FreeAxes, found: Relations
) -> tuple[list[Call], list[str]]:
    """Calls at other sizes that the model takes, and notes on those that it does not.

    Raises:
        GraphPruneError: it takes none of them.
    """
    calls, notes = [], []
    for seed, sizes in enumerate(other_sizes(free, found, arguments), start=1):
        call = Call(sizes, arguments.shaped(shapes_at(free, arguments, sizes), seed=seed))
        reason = _refused(model, call)
        if reason is None:
            calls.append(call)
        else:
            notes.append(f"not tried{call.where}, which the model itself does not take: {reason}")
    if not calls and notes:
        raise GraphPruneError(_takes_no_other(model, arguments, free, found, notes[0]))
    return calls, notes


def _least_calls(
    model: nn.Module, arguments: FlatArguments, free: FreeAxes, found: Relations, known: Sequence[Call]
) -> list[Call]:
    """Calls with 1 for all dims, and with one dim 0, as the past of a first step has, where the model takes them and
    its answer is neither empty nor NaN."""
    own = {name: known[0].sizes.get(name, 1) for name in found.free}
    choices = [dict.fromkeys(own, 1), *({**own, name: 0} for name in own if free.ranges[name][0] == 0)]
    calls: list[Call] = []
    for chosen in choices:
        sizes = complete(chosen, free, found, arguments, least=0, limited=False)
        if sizes is None or sizes in [call.sizes for call in known]:
            continue
        call = Call(sizes, arguments.shaped(shapes_at(free, arguments, sizes), seed=1))
        try:
            _, outputs = named_outputs(run_model(model, call.arguments))
        except GraphPruneError:
            continue
        if all(t.numel() and bool(t.isfinite().all()) for t in outputs):
            calls.append(call)
    return calls


def _refused(model: nn.Module, call: Call) -> str | None:
    """Why the model does not run there, if it does not."""
    try:
        run_model(model, call.arguments, call.where)
    except GraphPruneError as error:
        return reason_of(error.__cause__ or error)
    return None


def _takes_no_other(
    model: nn.Module, arguments: FlatArguments, free: FreeAxes, found: Relations, note: str
) -> str:
    """The message for a model that runs at no other size: which dim it is, found out by changing one at a time."""
    own = free.sizes(arguments.tensors)
    for name in found.free:
        for size in (own.get(name, 1) + 1, own.get(name, 1) + 2):
            sizes = complete({**{n: own.get(n, 1) for n in found.free}, name: size}, free, found, arguments)
            if sizes is None:
                continue
            reason = _refused(model, Call(sizes, arguments.shaped(shapes_at(free, arguments, sizes), seed=1)))
            if reason is not None:
                places = _places_of(name, arguments, free)
                return (
                    f"{type(model).__name__} cannot be exported with {name!r} ({places}) free: it does not run where "
                    f"that is {size} instead of {own.get(name, 1)} ({reason}). {_CURE}, or say which sizes it takes, "
                    f"such as Dim({name!r}, max=...) or 8 * Dim('n')"
                )
    return f"{type(model).__name__} cannot be exported with these free axes: {note}. {_CURE}"


_CURE = (
    "Use the size of the input instead of a number in the model, or leave the axis out of dynamic_shapes (for the "
    "batch: dynamic_batch=False)"
)


def _fixed(model: nn.Module, arguments: FlatArguments, free: FreeAxes, places: Sequence[tuple[int, int]]) -> str:
    """The message for axes that torch finds fixed, with the reason of the first."""
    told = []
    for i, axis in places:
        size = int(arguments.tensors[i].shape[axis])
        told.append(f"axis {axis} of input {arguments.names[i]!r} ({free.axes[i][axis].name!r}, {size} in the example)")
    why = _why(model, arguments, *places[0])
    return f"{type(model).__name__} cannot be exported with a free {' and '.join(told)}: {why}. {_CURE}"


def _why(model: nn.Module, arguments: FlatArguments, i: int, axis: int) -> str:
    """What happens at another size of that axis."""
    shapes = [list(tensor.shape) for tensor in arguments.tensors]
    size = shapes[i][axis]
    shapes[i][axis] = size + 1
    reason = _refused(model, Call({}, arguments.shaped(shapes, seed=1)))
    if reason is not None:
        return f"torch finds that only {size} fits; at {size + 1} the model raises {reason}"
    return (
        f"torch finds that the code makes a number of this size and works for {size} only (a comparison, a loop over "
        f"the axis or int() of the size does that)"
    )


def _places_of(name: str, arguments: FlatArguments, free: FreeAxes) -> str:
    found: list[tuple[str, int, Tensor]] = [
        (arguments.names[i], axis, arguments.tensors[i])
        for i, own in enumerate(free.axes)
        for axis, one in own.items()
        if name in one.dims
    ]
    return ", ".join(f"axis {axis} of {owner!r}" for owner, axis, _ in found)
