"""Samples in any order, from batches as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ....tracing.example import ExampleInput

# Inputs that are held at a time; of more, one part after the other is gone through in any order.
HELD = 1 << 30


def shuffled(examples: Iterable[ExampleInput], size: int, generator: torch.Generator) -> Iterator[ExampleInput]:
    """All samples once, in batches of `size` where they can be joined, else in those they came in, cut to that size."""
    part: list[ExampleInput] = []
    held = 0
    for example in examples:
        part.append(example)
        held += sum(tensor.nbytes for tensor in example.tensors())
        if held >= HELD:
            yield from _in_any_order(part, size, generator)
            part, held = [], 0
    yield from _in_any_order(part, size, generator)


def _in_any_order(part: Sequence[ExampleInput], size: int, generator: torch.Generator) -> Iterator[ExampleInput]:
    pieces: list[tuple[ExampleInput, Tensor]] = []
    for whole in _joined(part):
        order = torch.randperm(whole.samples, generator=generator) if separable(whole) else None
        pieces += [(whole, rows) for rows in order.split(size)] if order is not None else [(whole, torch.empty(0))]
    for number in torch.randperm(len(pieces), generator=generator).tolist():
        whole, rows = pieces[number]
        yield chosen(whole, rows) if len(rows) else whole


def chosen(example: ExampleInput, rows: Tensor | range) -> ExampleInput:
    """Some samples of a batch."""
    index = torch.as_tensor(rows)
    return example.map(lambda t: t[index.to(t.device)])


def separable(example: ExampleInput) -> bool:
    """Whether the first axis of every tensor counts the samples, so that some of them are a batch too."""
    samples = example.batch_size
    return samples is not None and all(t.dim() and t.shape[0] == samples for t in example.tensors())


def _joined(part: Sequence[ExampleInput]) -> list[ExampleInput]:
    """All in one batch where they differ in nothing but the number of samples, else as they are."""
    forms = [_form(example) for example in part]
    if len(part) < 2 or any(form is None or form != forms[0] for form in forms):
        return list(part)
    columns = [torch.cat(tensors) for tensors in zip(*(_mapped(example) for example in part), strict=True)]
    rest = iter(columns)
    return [part[0].map(lambda _: next(rest))]


def _mapped(example: ExampleInput) -> list[Tensor]:
    """The tensors in the order in which `map` meets them."""
    found: list[Tensor] = []
    example.map(lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _form(example: ExampleInput) -> tuple[object, ...] | None:
    """What must be the same for batches to be joined; None where they cannot be."""
    tensors = _mapped(example)
    if not separable(example) or len(tensors) != len(example.tensors()):
        return None
    plain = example.map(lambda t: None)  # type: ignore[arg-type, return-value]
    return repr((plain.args, plain.kwargs)), *((tuple(t.shape[1:]), t.dtype) for t in tensors)
