"""What an ATen operator does with memory and with values, as far as leaving it out of a run is concerned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Answered from shapes and settings alone, though the result is no tensor.
_BY_FORM = frozenset(("aten::_fused_sdp_choice", "aten::is_same_size", "aten::sym_size", "aten::is_contiguous"))
# With bool indices the shape of the result depends on their values, with others it does not.
_INDEXING = frozenset(("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"))
_READS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_BOOLS = (torch.bool, torch.uint8)


@dataclasses.dataclass(frozen=True)
class Operation:
    """`writes`: names and places of the arguments that are written to. `by_form`: needs no values at all. `reads`:
    what follows depends on values in ways that tensors do not show. `random`: draws numbers unless `idle` arguments
    (place, value) say otherwise. `known`: one of torch's own, whose schema can be relied on."""

    name: str
    writes: tuple[tuple[str, int], ...]
    by_form: bool
    reads: bool
    random: bool
    idle: tuple[tuple[str, int, Any], ...]
    known: bool

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that a call writes to."""
        given = (kwargs.get(name, args[place] if place < len(args) else None) for name, place in self.writes)
        return [t for value in given for t in tensors_of(value)]

    def draws(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call advances a random number generator."""
        if not self.random:
            return False
        values = ((kwargs.get(name, args[place] if place < len(args) else None), off) for name, place, off in self.idle)
        return not any(value is not None and value == off for value, off in values)

    def reads_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the values of its operands decide on more than the values of its result."""
        if self.name in _INDEXING:
            return any(t.dtype in _BOOLS for t in tensors_of((args[1], kwargs.get("indices"))))
        return self.reads


_IDLE: dict[str, Any] = {"dropout_p": 0.0, "dropout": 0.0, "train": False, "training": False}


@functools.cache
def operation(function: Any) -> Operation:
    """See `Operation`."""
    schema = function._schema
    written = tuple(
        (argument.name, place)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    idle = tuple(
        (argument.name, place, _IDLE[argument.name])
        for place, argument in enumerate(schema.arguments)
        if argument.name in _IDLE
    )
    tags = function.tags
    return Operation(
        schema.name,
        written,
        schema.name in _BY_FORM,
        any(tag in tags for tag in _READS) or not any("Tensor" in str(r.type) for r in schema.returns),
        torch.Tag.nondeterministic_seeded in tags,
        idle,
        function.namespace in ("aten", "prims"),
    )


# What no tensor lies in.
_ATOMS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def parts_of(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors among the arguments of a call, and the arguments without them, comparable; in one walk, as it is
    made for every operator of a run."""
    tensors: list[Tensor] = []
    return tensors, _numbers(value, tensors)


def _numbers(value: Any, tensors: list[Tensor]) -> Any:
    """See `parts_of`; not a function inside of it, which would keep tensors alive in a circle of references."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if isinstance(value, (tuple, list)):
        return tuple([_numbers(item, tensors) for item in value])
    if isinstance(value, dict):
        return tuple([(key, _numbers(item, tensors)) for key, item in value.items()])
    return value


def dense(tensor: Tensor) -> bool:
    """It fills its storage from the start, each place once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return bool(tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes)
