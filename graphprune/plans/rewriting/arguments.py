"""The arguments of recorded calls with their sizes as they have to be: one function per kind of call."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
from torch import fx

from .fitting import Survivors
from .parts import Call, Number, Ref


def _number(value: Any) -> int | None:
    """The recorded value of an argument that is a number."""
    if isinstance(value, Number):
        return int(value.value)
    return value if type(value) is int else None


def _tensor(call: Call, position: int = 0, *names: str) -> fx.Node | None:
    named = next((call.kwargs[n] for n in names if n in call.kwargs), None)
    value = call.args[position] if len(call.args) > position else named
    return value.node if isinstance(value, Ref) else None


def _sequence(args: list[Any], kwargs: dict[str, Any], position: int, names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """Where a list of sizes stands (a key for `_put`), and its items; given as one list or as separate arguments."""
    if len(args) > position:
        if isinstance(args[position], (tuple, list)):
            return position, list(args[position])
        return slice(position, None), list(args[position:])
    for name in names:
        if name in kwargs:
            value = kwargs[name]
            return name, list(value) if isinstance(value, (tuple, list)) else [value]
    return None, []


def _put(args: list[Any], kwargs: dict[str, Any], where: Any, items: list[Any]) -> None:
    if isinstance(where, str):
        kwargs[where] = items
    elif isinstance(where, slice):
        args[where] = items
    elif where is not None:
        args[where] = items


def _shape(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors, first: int = 1) -> None:
    where, items = _sequence(args, kwargs, first, ("size", "shape", "sizes", "dims"))
    ndim = len(call.out.meta["val"].shape)
    for back in range(1, len(items) + 1):
        value = _number(items[-back])
        if value is not None and value >= 0 and back <= ndim:
            items[-back] = s.size(items[-back], s.count(call.out, ndim - back))
    _put(args, kwargs, where, items)


def _repeated(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    """An axis of length 1 is repeated as often as the result is long; how often another one is, no channel decides."""
    where, items = _sequence(args, kwargs, 1, ("repeats", "dims"))
    node, out = _tensor(call), call.out.meta["val"].shape
    shape = () if node is None else node.meta["val"].shape
    for back in range(1, len(items) + 1):
        value = _number(items[-back])
        if value is not None and back <= len(out):
            stretched = back > len(shape) or shape[-back] == 1
            items[-back] = s.size(items[-back], s.count(call.out, len(out) - back) if stretched else value)
    _put(args, kwargs, where, items)


def _created(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    _shape(call, args, kwargs, s, 1 if call.op == "call_method" else 0)


def _unflatten(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    where, items = _sequence(args, kwargs, 2, ("sizes", "unflattened_size"))
    node = _tensor(call)
    assert node is not None
    first = _dim(args, kwargs, 1) % len(node.meta["val"].shape)
    items = [
        i if _number(i) in (None, -1) else s.size(i, s.count(call.out, first + k)) for k, i in enumerate(items)
    ]
    _put(args, kwargs, where, items)


def _dim(args: list[Any], kwargs: dict[str, Any], position: int) -> int:
    value = args[position] if len(args) > position else kwargs.get("dim", 0)
    return _number(value) or 0


def _split(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node = _tensor(call)
    dim = _dim(args, kwargs, 2)
    if node is None or not isinstance(call.out, list):
        return
    lengths = [shape[dim] for shape in call.out]
    bounds = np.cumsum([0, *lengths]).tolist()
    wanted = [s.count(node, dim, a, b) for a, b in itertools.pairwise(bounds)]
    names = ("split_size_or_sections", "split_size", "split_sizes")
    where, items = _sequence(args, kwargs, 1, names)
    if isinstance(where, slice):  # one size for all
        if wanted == lengths:
            return
        where, items = 1, lengths
        del args[2:]
        kwargs["dim"] = dim
    elif isinstance(where, str) and not isinstance(kwargs[where], (tuple, list)):
        if wanted == lengths:
            return
        del kwargs[where]
        where, items = "split_size_or_sections", lengths
    if where == 1 or call.op == "call_function":
        _put(args, kwargs, where, [s.size(i, w) for i, w in zip(items, wanted, strict=True)])


def _boundaries(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node = _tensor(call)
    where, items = _sequence(args, kwargs, 1, ("indices_or_sections", "indices"))
    given = args[1] if len(args) > 1 else kwargs.get(where)
    if node is None or isinstance(where, slice) or not isinstance(given, (tuple, list)):
        return
    dim = _dim(args, kwargs, 2)
    _put(args, kwargs, where, [_bound(i, node, dim, s) for i in items])


def _bound(value: Any, node: fx.Node, axis: int, s: Survivors) -> Any:
    """A position along an axis: as many indices survive before it. Counted from the front where something went."""
    position = _number(value)
    if position is None:
        return value
    kept = s.kept(node, axis)
    if kept.all():
        return value
    if position < 0:
        before = int(kept[: max(position + len(kept), 0)].sum())
        behind = int(kept.sum()) - before
        return s.size(value, -behind) if isinstance(value, Number) and behind else before
    return value if position > len(kept) else s.size(value, int(kept[:position].sum()))


def _index(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node = _tensor(call)
    if node is None:
        return
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    shape = node.meta["val"].shape
    taken = sum(_axes_taken(i) for i in items)
    out, axis = [], 0
    for item in items:
        if item is Ellipsis:
            axis += len(shape) - taken
        elif isinstance(item, slice):
            item = slice(_bound(item.start, node, axis, s), _bound(item.stop, node, axis, s), item.step)
            axis += 1
        elif _number(item) is not None:
            item = _bound(item, node, axis, s)
            axis += 1
        else:
            axis += _axes_taken(item)
        out.append(item)
    args[1] = tuple(out) if isinstance(args[1], tuple) else out[0]


def _axes_taken(item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    meta = item.node.meta["val"] if isinstance(item, Ref) and item.node is not None else None
    return len(meta.shape) if meta is not None and meta.dtype in (torch.bool, torch.uint8) else 1


def _narrow(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node, dim = _tensor(call), _dim(args, kwargs, 1)
    start = args[2] if len(args) > 2 else kwargs.get("start")
    length = args[3] if len(args) > 3 else kwargs.get("length")
    first, count = _number(start), _number(length)
    if node is None or first is None or count is None or length is None:
        return
    first %= node.meta["val"].shape[dim] or 1
    new = _bound(start, node, dim, s), s.size(length, s.count(node, dim, first, first + count))
    for position, (name, value) in enumerate(zip(("start", "length"), new, strict=True), 2):
        if len(args) > position:
            args[position] = value
        else:
            kwargs[name] = value


def _select(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node, dim = _tensor(call), _dim(args, kwargs, 1)
    if node is not None:
        if len(args) > 2:
            args[2] = _bound(args[2], node, dim, s)
        elif "index" in kwargs:
            kwargs["index"] = _bound(kwargs["index"], node, dim, s)


def _roll(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node = _tensor(call)
    where, shifts = _sequence(args[:2], kwargs, 1, ("shifts",))
    dims = args[2] if len(args) > 2 else kwargs.get("dims", ())
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    if node is None or len(dims) != len(shifts):
        return
    for k, (shift, dim) in enumerate(zip(shifts, dims, strict=True)):
        kept, amount = s.kept(node, dim), _number(shift)
        if amount is None or kept.all() or not amount % len(kept):
            continue
        moved = int(kept[len(kept) - amount % len(kept) :].sum())
        shifts[k] = s.size(shift, moved if amount > 0 else moved - int(kept.sum()))
    _put(args, kwargs, 1 if isinstance(where, slice) else where, shifts)


def _groups(position: int, wanted: Any) -> Any:
    def rewrite(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
        given = args[position] if len(args) > position else kwargs.get("groups", kwargs.get("num_groups"))
        value = _number(given)
        if given is None or value is None or value == 1:
            return
        new = s.size(given, wanted(call, value, s))
        if len(args) > position:
            args[position] = new
        else:
            kwargs["groups" if "groups" in kwargs else "num_groups"] = new

    return rewrite


def _conv_groups(call: Call, groups: int, s: Survivors) -> int:
    x, weight = _tensor(call, 0, "input"), _tensor(call, 1, "weight")
    if x is None or weight is None:
        return groups
    channels = len(x.meta["val"].shape) - len(weight.meta["val"].shape) + 1
    return s.count(x, channels) // s.count(weight, 1)


def _transposed_groups(call: Call, groups: int, s: Survivors) -> int:
    weight = _tensor(call, 1, "weight")
    if weight is None:
        return groups
    channels = len(call.out.meta["val"].shape) - len(weight.meta["val"].shape) + 1
    return s.count(call.out, channels) // s.count(weight, 1)


def _norm_groups(call: Call, groups: int, s: Survivors) -> int:
    x = _tensor(call, 0, "input")
    return s.count(x, 1) if x is not None and x.meta["val"].shape[1] == groups else groups


def _shuffle_groups(call: Call, groups: int, s: Survivors) -> int:
    x = _tensor(call, 0, "input")
    return groups if x is None else int(s.kept(x, 1).reshape(groups, -1).any(1).sum())


def _normalized(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    node = _tensor(call, 0, "input")
    where, items = _sequence(args[:2], kwargs, 1, ("normalized_shape",))
    if node is None:
        return
    ndim = len(node.meta["val"].shape)
    new = [s.size(i, s.count(node, ndim - len(items) + k)) for k, i in enumerate(items)]
    _put(args, kwargs, 1 if isinstance(where, slice) else where, new)


def _attention(call: Call, args: list[Any], kwargs: dict[str, Any], s: Survivors) -> None:
    """The temperature 1/sqrt(features) is written out where features go."""
    node = _tensor(call, 0, "query")
    given = args[6] if len(args) > 6 else kwargs.get("scale")
    if node is not None and given is None and not s.kept(node, -1).all():
        kwargs["scale"] = node.meta["val"].shape[-1] ** -0.5
        del args[6:]


_CONV = _groups(6, _conv_groups)
_TRANSPOSED = _groups(6, _transposed_groups)
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _shape),
    **dict.fromkeys("zeros ones empty full rand randn new_zeros new_ones new_empty new_full".split(), _created),
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes"), _split),
    "tensor_split": _boundaries,
    **dict.fromkeys(("getitem", "setitem"), _index),
    **dict.fromkeys(("narrow", "narrow_copy"), _narrow),
    "select": _select,
    "roll": _roll,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    "group_norm": _groups(1, _norm_groups),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _groups(1, _shuffle_groups)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    "scaled_dot_product_attention": _attention,
}
_SCALING = frozenset(("mul", "mul_", "div", "div_", "true_divide"))


def rewritable(call: Call) -> bool:
    """Sizes and scales in this call can be rewritten."""
    if call.op not in ("call_function", "call_method"):
        return False
    return call.name in _SIZES or call.name in _SCALING


def takes_sizes(call: Call) -> bool:
    """The numbers in this call are sizes (and those of every other call are not)."""
    return rewritable(call) and call.name in _SIZES and call.name != "scaled_dot_product_attention"


def rewritten(call: Call, survivors: Survivors) -> Call:
    """The call as it must be made in the pruned network."""
    args, kwargs = list(call.args), dict(call.kwargs)
    target = call.target
    function = _SIZES.get(call.name) if call.op in ("call_function", "call_method") else None
    if function is not None:
        function(call, args, kwargs, survivors)
        if call.name in ("split", "unsafe_split") and any(isinstance(a, list) for a in (*args[1:2], *kwargs.values())):
            target = target.replace("split", "split_with_sizes") if "with_sizes" not in target else target
            if "split_size_or_sections" in kwargs:
                args.insert(1, kwargs.pop("split_size_or_sections"))
    return dataclasses.replace(call, target=target, args=tuple(args), kwargs=kwargs)
