"""A program in a form that converters with fewer operators and axes take, equal to the last bit.

`x.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)`, as most vision transformers have it, needs five axes, of
which the batch is not the first. `x.chunk(3, -1)`, each `.reshape(B, N, H, D).permute(0, 2, 1, 3)`, is the same. And
`x.mT` is a transpose.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten
_RESHAPES = (_ATEN.reshape.default, _ATEN.view.default, _ATEN.unflatten.int)


def simpler(module: Any) -> Any:
    """The module of a `torch.export` program, changed in place."""
    for node in module.graph.nodes:
        if node.target is _ATEN.mT.default:
            node.target, node.args = _ATEN.transpose.int, (*node.args, -2, -1)
    _slice_parts(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _slice_parts(module: Any) -> None:
    """Take parts of an axis that was split as slices."""
    chunks: dict[tuple[Any, int], Any] = {}
    for node in list(module.graph.nodes):
        taken = _taken(node)
        found = None if taken is None else _split(taken[0], taken[1])
        if taken is not None and found is not None:
            with module.graph.inserting_before(node):
                key = found.tensor, found.parts
                if key not in chunks:
                    chunks[key] = module.graph.call_function(_ATEN.chunk.default, (*key, -1))
                node.replace_all_uses_with(_instead(module.graph, chunks[key], found, taken[2]))


@dataclasses.dataclass(frozen=True)
class _Split:
    """A last axis that is split; the parts, the first of the new axes, are told apart afterwards.

    `shape`, `order`: of one part, and how its axes are permuted.
    """

    tensor: Any
    parts: int
    shape: Sequence[int]
    order: Sequence[int]


def _taken(node: Any) -> tuple[Any, int, int] | None:
    """(tensor, axis, index) where the node is one index of one axis."""
    if node.target is _ATEN.select.int:
        return tuple(node.args)
    if node.target is operator.getitem and getattr(node.args[0], "target", None) is _ATEN.unbind.int:
        tensor, *axis = node.args[0].args
        return tensor, axis[0] if axis else 0, node.args[1]
    return None


def _split(tensor: Any, axis: int) -> _Split | None:
    permuted = tensor.target is _ATEN.permute.default
    reshaped = tensor.args[0] if permuted else tensor
    if reshaped.target not in _RESHAPES:
        return None
    shape, before = _shape(reshaped), _shape(reshaped.args[0])
    order = [dim % len(shape) for dim in tensor.args[1]] if permuted else list(range(len(shape)))
    own = order[axis % len(shape)]
    last = len(before) - 1
    if own != last or len(shape) <= len(before) or shape[:last] != before[:last]:
        return None
    rest = [dim - (dim > own) for dim in order if dim != own]
    return _Split(reshaped.args[0], shape[own], shape[:own] + shape[own + 1 :], rest)


def _shape(node: Any) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _instead(graph: Any, parts: Any, found: _Split, index: int) -> Any:
    part = graph.call_function(operator.getitem, (parts, index % found.parts))
    reshaped = graph.call_function(_ATEN.reshape.default, (part, list(found.shape)))
    return graph.call_function(_ATEN.permute.default, (reshaped, list(found.order)))
