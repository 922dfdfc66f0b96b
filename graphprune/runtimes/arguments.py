"""A model's arguments and results as flat lists of named tensors, which is all that an ONNX file knows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphPruneError
from ..support.numbers import check_integer
from ..tracing.containers import is_holder, opened
from ..tracing.example import ExampleInput
from .resizing import grown_batch, sized


@dataclasses.dataclass(frozen=True)
class FlatArguments:
    """The tensors of one call, in order, with the names they get in an ONNX file.

    A tensor shares the batch if the first of its dimensions is as long as that of the first tensor with dimensions.
    `batch_size` is that length, None where no tensor has dimensions. Other values (None, numbers, strings) are
    constants of the call. `roots`: the names of the arguments that the tensors lie in, one for each argument.
    """

    example: ExampleInput
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    batch_size: int | None
    roots: tuple[str, ...]

    @classmethod
    def of(cls, example_input: Any, model: nn.Module | None = None) -> FlatArguments:
        """Names come from the signature of `model.forward`, else positional arguments are named by position.

        Raises:
            GraphPruneError: no tensor among the arguments, one inside an object that is no tuple, list, dict, cache or
                registered pytree class, or one with a batch of 0.
        """
        example = ExampleInput.of(example_input)
        positional = _positional_names(model, len(example.args))
        named: list[tuple[str, Tensor]] = []
        for name, value in (*zip(positional, example.args, strict=True), *example.kwargs.items()):
            named.extend(_named(value, name))
        tensors = tuple(tensor for _, tensor in named)
        if len(tensors) != len(example.tensors()) or not _replaceable(example, tensors):
            raise GraphPruneError(
                "example_input holds a tensor inside an object that is no tuple, list or dict; an ONNX file has only "
                "tensors as inputs, so pass it in one of these, or register its class with torch.utils._pytree"
            )
        if not tensors:
            raise GraphPruneError("example_input holds no tensor; an ONNX file needs at least one input")
        batch = next((t.shape[0] for t in tensors if t.ndim), None)
        if batch == 0:
            raise GraphPruneError("example_input has a batch of 0; give an example of at least one item")
        taken = () if model is None else [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        names = tuple(unique([name for name, _ in named], taken))
        return cls(example, names, tensors, batch, (*positional, *example.kwargs))

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each tensor, whether its first dimension is the batch."""
        return tuple(t.ndim > 0 and t.shape[0] == self.batch_size for t in self.tensors)

    def rebuild(self, tensors: Sequence[Tensor]) -> ExampleInput:
        """The call with other tensors in the places of its own."""
        remaining = iter(tensors)
        return self.example.map(lambda _: next(remaining))

    def resized(self, batch_size: int, seed: int = 0) -> FlatArguments:
        """The same call at another batch size: the first rows, then repeated rows with floating-point values changed.

        Floating-point values of repeated rows are multiplied by factors from [0.5, 1), so that rows differ, zeros and
        infinities stay what they are and no value leaves the range of the example; integers are repeated as they are.

        Raises:
            GraphPruneError: `batch_size` is less than 1, or no tensor has a batch.
        """
        check_integer("batch size", batch_size, 1)
        if batch_size == self.batch_size:
            return self
        if self.batch_size is None:
            raise GraphPruneError(
                f"example_input cannot be resized to batch size {batch_size}: no tensor in it has a dimension"
            )
        generator = torch.Generator().manual_seed(seed)
        tensors = [
            grown_batch(tensor, batch_size, generator) if batched else tensor
            for tensor, batched in zip(self.tensors, self.batched, strict=True)
        ]
        return dataclasses.replace(
            self, example=self.rebuild(tensors), tensors=tuple(tensors), batch_size=batch_size
        )

    def shaped(self, shapes: Sequence[Sequence[int]], seed: int = 0) -> FlatArguments:
        """The same call with tensors of other shapes, made from its own (see `sized`)."""
        generator = torch.Generator().manual_seed(seed)
        tensors = [sized(tensor, shape, generator) for tensor, shape in zip(self.tensors, shapes, strict=True)]
        batch = next((t.shape[0] for t in tensors if t.ndim), None)
        return dataclasses.replace(self, example=self.rebuild(tensors), tensors=tuple(tensors), batch_size=batch)


def named_outputs(outputs: Any, taken: Iterable[str] = ()) -> tuple[list[str], list[Tensor]]:
    """A unique name for each tensor of a model's result, and these tensors, in a fixed order.

    A single tensor is "output", those of a tuple "output_0", "output_1"..., those of a dict or a dataclass go by
    their keys. No name is one of `taken`: what a decoder returns as "past_key_values_0_0" is then "present_0_0".
    A number or None in the result has no place in an ONNX file.

    Raises:
        GraphPruneError: no tensor in the result.
    """
    named = list(_named(outputs, "output", objects=True))
    if not named:
        raise GraphPruneError(f"the model returned no tensor but {type(outputs).__name__}; there is nothing to export")
    names, known = [name for name, _ in named], set(taken)
    return unique([_present(name) if name in known else name for name in names], known), [tensor for _, tensor in named]


def _present(name: str) -> str:
    """What decoders call the next past."""
    for past in ("past_key_values", "past_key_value", "past"):
        if name.startswith(past):
            return "present" + name.removeprefix(past)
    return name


def unique(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """`names` with "_1", "_2"... added where one is repeated or taken."""
    used, result = set(taken), []
    for name in names:
        candidate, number = name, 0
        while candidate in used or (number and candidate in names):
            number += 1
            candidate = f"{name}_{number}"
        used.add(candidate)
        result.append(candidate)
    return result


def _replaceable(example: ExampleInput, tensors: Sequence[Tensor]) -> bool:
    """Whether `ExampleInput.map` reaches these tensors, in this order."""
    reached: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        reached.append(id(tensor))
        return tensor

    example.map(note)
    return reached == [id(tensor) for tensor in tensors]


def _positional_names(model: nn.Module | None, count: int) -> list[str]:
    names: list[str] = []
    if model is not None:
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                names.extend(f"{parameter.name}_{i}" for i in range(count - len(names)))
    return [names[i] if i < len(names) else f"input_{i}" for i in range(count)]


def parts_of(value: Any, *, objects: bool = False) -> list[tuple[Any, Any]]:
    """(key, value) of what lies in a tuple, list, dict, registered pytree class or cache, in the order of the inputs;
    empty for everything else. With `objects`, also inside dataclasses and other plain objects."""
    if isinstance(value, (Tensor, nn.Module)):
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or range(len(value))
        return list(zip(names, value, strict=True))
    parts = opened(value)
    if parts is not None:
        return list(zip(parts.keys, parts.parts, strict=True))
    if is_holder(value, objects) or (objects and hasattr(value, "__dict__")):
        return list(vars(value).items())
    return []


def _named(value: Any, name: str, *, objects: bool = False, depth: int = 0) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) pairs inside `value`; with `objects`, also inside dataclasses and other plain objects."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth > 16:
        return
    inner = objects or is_holder(value, False)
    for key, item in parts_of(value, objects=objects):
        # The result itself has no name of its own: its keys are enough.
        own = str(key) if depth == 0 and objects and isinstance(key, str) else f"{name}_{key}"
        yield from _named(item, own, objects=inner, depth=depth + 1)
