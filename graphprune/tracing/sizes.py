"""Which arguments of a torch call are sizes, and how they line up with the ATen call that follows.

The recorder sees every call twice: as the user wrote it (`x.view(b, heads, -1)`), where numbers still carry their
history, and as the ATen operator it becomes (`aten.view(x, [2, 4, 8])`), where they do not. The functions here read the
first form and return a `CallSizes` that the recorder attaches to the nodes of the second.

An ATen call with no `CallSizes` computed its sizes inside torch (`flatten`, `permute`): it adapts by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .origin import TRACED, Expr, is_traced, origin_of


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """The numbers a user's call passed.

    `kind` says what they mean: "shape" (target sizes, aligned with the last axes of the result), "repeats" (how often,
    aligned likewise), "split" (one size per piece, or a single one for all), "boundaries" (tensor_split), "index" (what
    stood between the brackets, see `index_entries`), "chunks" (a number of equal pieces), "groups",
    "normalized_shape", "shift" (roll), "creation" (sizes of a new tensor, None for those that are read from a tensor).
    """

    kind: str
    values: tuple[Any, ...]
    function: str


def _shape_args(args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "shape") -> tuple[Any, ...] | None:
    rest = args[1:]
    if not rest:
        for key in (name, "size", "shape", "sizes", "dims"):
            if key in kwargs:
                rest = (kwargs[key],)
                break
    if len(rest) == 1 and isinstance(rest[0], (tuple, list, torch.Size)):
        rest = tuple(rest[0])
    if not rest or not all(isinstance(r, int) for r in rest):
        return None
    return rest


def _shape(function: str) -> Callable[..., CallSizes | None]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
        values = _shape_args(args, kwargs)
        return None if values is None else CallSizes("shape", tuple(map(origin_of, values)), function)

    return read


def _creation(function: str, skip: int) -> Callable[..., CallSizes | None]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
        values = args[skip:]
        if not values and "size" in kwargs:
            values = (kwargs["size"],)
        if values and isinstance(values[0], (tuple, list, torch.Size)):
            values = tuple(values[0])
        if not values or not all(isinstance(v, (int, torch.Tensor)) for v in values):
            return None
        return CallSizes(
            "creation", tuple(None if isinstance(v, torch.Tensor) else origin_of(v) for v in values), function
        )

    return read


def _repeats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    values = _shape_args(args, kwargs, "repeats")
    return None if values is None else CallSizes("repeats", tuple(map(origin_of, values)), "repeat")


def _unflatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    sizes = args[2] if len(args) > 2 else kwargs.get("sizes", kwargs.get("unflattened_size"))
    if not isinstance(sizes, (tuple, list)) or not isinstance(dim, int):
        return None
    after = x.dim() - 1 - int(dim) % x.dim()
    return CallSizes("shape", (*map(origin_of, sizes), *([None] * after)), "unflatten")


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    sizes = (
        args[1]
        if len(args) > 1
        else kwargs.get("split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes")))
    )
    if isinstance(sizes, int):
        return CallSizes("split", (origin_of(sizes),), "split")
    if isinstance(sizes, (tuple, list)) and all(isinstance(s, int) for s in sizes):
        return CallSizes("split", tuple(map(origin_of, sizes)), "split")
    return None


def _chunks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    count = (
        args[1] if len(args) > 1 else kwargs.get("chunks", kwargs.get("indices_or_sections", kwargs.get("sections")))
    )
    return CallSizes("chunks", (origin_of(count),), "chunk") if isinstance(count, int) else None


def _bound(value: Any) -> Expr | None:
    return origin_of(value) if isinstance(value, int) and not isinstance(value, bool) else None


def index_entries(index: Any, ndim: int) -> tuple[Any, ...]:
    """What `x[index]` asks for, in order.

    ("slice", start, stop) with expressions or None (and "exact" where a stop past the end is an error), ("int", expr),
    ("new",) for a new axis, ("other",) for whatever takes one axis of x otherwise (a tensor, a list, an axis covered by
    an Ellipsis).
    """
    items = index if isinstance(index, tuple) else (index,)
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis and not isinstance(i, bool))
    entries: list[tuple[Any, ...]] = []
    for item in items:
        if item is None or isinstance(item, bool):
            entries.append(("new",))
        elif item is Ellipsis:
            entries += [("other",)] * (ndim - consumed)
        elif isinstance(item, slice):
            entries.append(("slice", _bound(item.start), _bound(item.stop)))
        elif isinstance(item, int):
            entries.append(("int", origin_of(item)))
        else:
            entries.append(("other",))
    return tuple(entries)


def _on_axis(x: Any, dim: Any, entry: tuple[Any, ...]) -> CallSizes:
    return CallSizes("index", (*([("other",)] * (int(dim) % x.dim())), entry), entry[0])


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    return CallSizes("index", index_entries(args[1], args[0].dim()), "__getitem__")


def _narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    start = args[2] if len(args) > 2 else kwargs.get("start", 0)
    length = args[3] if len(args) > 3 else kwargs.get("length")
    if not (isinstance(start, int) and isinstance(length, int) and isinstance(dim, int)):
        return None
    return _on_axis(x, dim, ("slice", origin_of(start), origin_of(start + length), "exact"))


def _select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    index = args[2] if len(args) > 2 else kwargs.get("index")
    if not isinstance(index, int) or not isinstance(dim, int):
        return None
    return _on_axis(x, dim, ("int", origin_of(index)))


def _position(kind: str, position: int, key: str) -> Callable[..., CallSizes | None]:
    """One argument: an integer or a sequence of integers."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
        value = args[position] if len(args) > position else kwargs.get(key)
        if isinstance(value, int):
            value = (value,)
        if not isinstance(value, (tuple, list, torch.Size)) or not all(isinstance(v, int) for v in value):
            return None
        return CallSizes(kind, tuple(map(origin_of, value)), kind)

    return read


def _tensor_split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    where = (
        args[1] if len(args) > 1 else kwargs.get("indices_or_sections", kwargs.get("sections", kwargs.get("indices")))
    )
    if isinstance(where, int):
        return CallSizes("chunks", (origin_of(where),), "tensor_split")
    if isinstance(where, (tuple, list)) and all(isinstance(w, int) for w in where):
        return CallSizes("boundaries", tuple(map(origin_of, where)), "tensor_split")
    return None


READERS: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], CallSizes | None]] = {
    "view": _shape("view"),
    "reshape": _shape("reshape"),
    "expand": _shape("expand"),
    "broadcast_to": _shape("expand"),
    "repeat": _repeats,
    "tile": _repeats,
    "unflatten": _unflatten,
    "split": _split,
    "unsafe_split": _split,
    "split_with_sizes": _split,
    "unsafe_split_with_sizes": _split,
    "chunk": _chunks,
    "unsafe_chunk": _chunks,
    "tensor_split": _tensor_split,
    "hsplit": _tensor_split,
    "vsplit": _tensor_split,
    "dsplit": _tensor_split,
    "__getitem__": _getitem,
    "__setitem__": _getitem,
    "narrow": _narrow,
    "narrow_copy": _narrow,
    "select": _select,
    "roll": _position("shift", 1, "shifts"),
    "group_norm": _position("groups", 1, "num_groups"),
    "layer_norm": _position("normalized_shape", 1, "normalized_shape"),
    "rms_norm": _position("normalized_shape", 1, "normalized_shape"),
    "conv1d": _position("groups", 6, "groups"),
    "conv2d": _position("groups", 6, "groups"),
    "conv3d": _position("groups", 6, "groups"),
    "conv_transpose1d": _position("groups", 6, "groups"),
    "conv_transpose2d": _position("groups", 6, "groups"),
    "conv_transpose3d": _position("groups", 6, "groups"),
    "convolution": _position("groups", 8, "groups"),
    "channel_shuffle": _position("groups", 1, "groups"),
    "native_channel_shuffle": _position("groups", 1, "groups"),
    "zeros": _creation("zeros", 0),
    "ones": _creation("ones", 0),
    "empty": _creation("empty", 0),
    "full": _creation("full", 0),
    "rand": _creation("rand", 0),
    "randn": _creation("randn", 0),
    "new_zeros": _creation("new_zeros", 1),
    "new_ones": _creation("new_ones", 1),
    "new_empty": _creation("new_empty", 1),
    "new_full": _creation("new_full", 1),
}


def read_sizes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSizes | None:
    """The sizes in a call of the torch function `name`, one of `READERS`; None if it is given none."""
    return READERS[name](args, kwargs) if args else None


_SCALING = frozenset(("mul", "mul_", "div", "div_", "true_divide", "__mul__", "__truediv__", "__rmul__", "__imul__"))
# Functions to which a number may be a scale, and those of which each number is a size or a scale.
SCALED = _SCALING | {"scaled_dot_product_attention"}
ACCOUNTED = SCALED | READERS.keys()


def read_scalars(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Expr] | None:
    """Traced numbers that scale a tensor (`q * self.head_dim ** -0.5`) in a call of one of `SCALED`, by position of the
    argument. The `scale` of scaled_dot_product_attention counts as position -1."""
    found: dict[int, Expr] = {}
    if name in _SCALING:
        found = {i: a.origin for i, a in enumerate(args) if is_traced(a)}
        if is_traced(kwargs.get("other")):
            found[1] = kwargs["other"].origin
    elif is_traced(kwargs.get("scale")):
        found[-1] = kwargs["scale"].origin
    return found or None


def other_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Traced numbers in a call of none of `ACCOUNTED`: they must stay what they are."""
    found: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, TRACED):
            found.append(value)
        elif type(value) in (tuple, list, torch.Size):
            found += [item for item in value if isinstance(item, TRACED)]
    return [number for number in found if is_traced(number)]
