"""Which rows a tensor holds, where code picks them by value: experts, early exits, regions, sorted tokens.

Two networks that differ pick different rows, and what one makes of its rows is no target for the other. So whatever is
computed from picked rows carries their numbers along, as long as a row stays a row.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor

_KEY = "_graphprune_rows"
# Put rows back where they came from: the result has the rows of what is written into.
_RESTORE = frozenset("index_add index_copy index_put scatter scatter_add scatter_reduce masked_scatter".split())
# Move rows, with other arguments than tensors.
_MOVE = frozenset("__getitem__ split chunk tensor_split narrow flip roll repeat_interleave unbind select".split())
# Hand values of tensors to Python, which may then pick by them.
TELL = frozenset("tolist item numpy __array__ __int__ __index__ __bool__ __float__ __contains__".split())
_TURN = frozenset("t transpose permute movedim swapaxes swapdims moveaxis".split())


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """`numbers`: for each row (the leading axes) its number before anything was picked, None where rows are no longer
    rows; `sizes`: the lengths that these numbers count; `picks`: everything that was picked on the way."""

    numbers: Tensor | None
    sizes: tuple[int, ...]
    picks: tuple[Tensor, ...]

    def same(self, other: Rows) -> bool:
        """Both picked the same."""
        pairs = zip(self.picks, other.picks, strict=False)
        return len(self.picks) == len(other.picks) and all(a is b or torch.equal(a, b) for a, b in pairs)

    def unknown(self) -> Rows:
        return dataclasses.replace(self, numbers=None)


def rows_in(tensor: Any) -> Rows | None:
    """The rows of a tensor; None where all are there, in their order."""
    return tensor.__dict__.get(_KEY) if isinstance(tensor, Tensor) else None


def picking(name: str, args: Any, kwargs: Any, told: bool = False) -> list[Tensor]:
    """What a call picks rows by: indices or a mask. `told`: Python knows values of tensors, and numbers and ranges that
    it picks by may follow from them."""
    if name == "__getitem__" and len(args) == 2:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        by = [i for i in index if isinstance(i, Tensor)]
        return by if not told or by else [_numbers(i, n) for i, n in _told(index, args[0])]
    if name in ("index_select", "gather", "take_along_dim", "masked_select"):
        return [a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
    return [] if name != "embedding" else _looked_up(args)[1:]


def _looked_up(args: Any) -> list[Tensor]:
    """A table that was computed, and the numbers of the rows that are looked up in it."""
    given = [a for a in args[:2] if isinstance(a, Tensor)]
    if len(given) < 2 or any(isinstance(a, torch.nn.Parameter) for a in given):
        return []
    return sorted(given, key=lambda t: not t.is_floating_point())


def _told(index: tuple[Any, ...], x: Any) -> list[tuple[Any, int]]:
    """What leaves something out, of the parts of an index without tensors, and the lengths that they pick from."""
    if not isinstance(x, Tensor) or any(i is None or i is Ellipsis for i in index) or len(index) > x.dim():
        return []
    return [(i, n) for i, n in zip(index, x.shape, strict=False) if i != slice(None)]


def _numbers(index: Any, length: int) -> Tensor:
    return torch.arange(length)[index].reshape(-1)


def follow(name: str, function: Any, args: Any, kwargs: Any, out: Any, by: list[Tensor]) -> None:
    """Give the results of a call their rows; `by`: what it picks by."""
    name = name.rstrip("_") if not name.startswith("__") else name
    made = [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)] if _many(out) else []
    if not made:
        return
    if by:
        if name == "embedding":
            name, function, args = "__getitem__", operator.getitem, tuple(_looked_up(args))
        picked = _picked(name, function, args, kwargs, by)
        for tensor in made:
            _put(tensor, _carried(picked, tensor))
        return
    given = args[:1] if name in _RESTORE else _flat((args, kwargs))
    found = [rows for a in given if (rows := rows_in(a)) is not None]
    if found:
        _follow_all(name, function, args, kwargs, found, made)


def _follow_all(name: str, function: Any, args: Any, kwargs: Any, found: list[Rows], made: list[Tensor]) -> None:
    rows: Rows = found[0]
    if name in ("cat", "concat", "concatenate") and made[0].dim() > 1 and len(found) == len(args[0]):
        numbers = [r.numbers for r in found]
        whole = sum(n.shape[0] for n in numbers if n is not None)
        if all(n is not None and n.dim() == 1 for n in numbers) and whole == made[0].shape[0]:
            rows = Rows(torch.cat(numbers), rows.sizes, tuple(p for r in found for p in r.picks))  # type: ignore[arg-type]
            _put(made[0], _carried(rows, made[0]))
            return
    for other in found[1:]:
        if other is not rows and not (rows.same(other) and _equal(rows.numbers, other.numbers)):
            rows = Rows(None, (), (*rows.picks, *other.picks))
    moved: list[Any] = [rows] * len(made)
    if name in _TURN or name in ("sort", "topk", "msort"):
        moved = [rows.unknown()] * len(made)
    elif name in _MOVE and rows.numbers is not None and rows_in(args[0]) is rows:
        moved = _moved(name, function, args, kwargs, rows, len(made))
    for tensor, one in zip(made, moved, strict=True):
        _put(tensor, _carried(one, tensor))


def _of_rows(index: Any) -> tuple[Any, ...]:
    """An index without the parts at its end that take all there is, as of features."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    while len(parts) > 1 and isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts = parts[:-1]
    return parts


def _moved(name: str, function: Any, args: Any, kwargs: Any, rows: Rows, count: int) -> list[Rows]:
    given = (_of_rows(args[1]),) if name == "__getitem__" else args[1:]
    try:
        found = function(rows.numbers, *given, **kwargs)
    except Exception:  # it moves something else than rows: a channel, a pixel
        return [rows.unknown()] * count
    parts = [found] if isinstance(found, Tensor) else list(found)
    if len(parts) != count:
        return [rows.unknown()] * count
    return [dataclasses.replace(rows, numbers=part if part.dim() else part.reshape(1)) for part in parts]


def _picked(name: str, function: Any, args: Any, kwargs: Any, by: list[Tensor]) -> Rows:
    x = args[0]
    before = rows_in(x)
    picks = ((*before.picks,) if before is not None else ()) + tuple(t.detach().clone() for t in by)
    unknown = Rows(None, (), picks)
    if before is not None and before.numbers is None:
        return unknown
    if name == "masked_select":
        return unknown
    if name == "__getitem__":
        index = _of_rows(args[1])
        if any(i is None or i is Ellipsis for i in index):
            return unknown
        axes = sum(i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1 for i in index)
        given: tuple[Any, ...] = (index,)
    else:
        axis = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int)), None))
        if not isinstance(axis, int):
            return unknown
        axis %= x.dim()
        axes, index_of = axis + 1, by[0]
        if name != "index_select":
            if axes == x.dim():
                return Rows(*_numbered(x, before, max(axes - 1, 1)), picks)  # inside a row
            if index_of.dim() != x.dim():
                return unknown
            flat = index_of.flatten(axes)
            if not bool((flat == flat[..., :1]).all()):
                return unknown
            index_of = flat[..., 0]
            if name == "take_along_dim":
                index_of = index_of.expand([n if a != axis else -1 for a, n in enumerate(x.shape[:axes])])
            function = torch.gather
        given = (axis, index_of)
    if axes > x.dim():
        return unknown
    numbers, sizes = _numbered(x, before, axes)
    if numbers is None:
        return unknown
    try:
        return Rows(function(numbers, *given), sizes, picks)
    except (RuntimeError, IndexError):
        return unknown


def _numbered(x: Tensor, before: Rows | None, axes: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """Numbers of the rows of `x` along its leading axes."""
    if before is None:
        sizes = tuple(x.shape[:axes])
        return torch.arange(math.prod(sizes), device=x.device).reshape(sizes), sizes
    assert before.numbers is not None
    return (before.numbers, before.sizes) if before.numbers.dim() == axes else (None, ())


def _carried(rows: Rows, tensor: Tensor) -> Rows | None:
    """The rows of a result of the same rows; None where all are in their places again."""
    numbers = rows.numbers
    if numbers is None:
        return rows
    if numbers.shape == tensor.shape[: numbers.dim()]:
        return None if _in_place(numbers, rows.sizes) else rows
    for axes in range(1, tensor.dim() + 1):
        if math.prod(tensor.shape[:axes]) == numbers.numel():
            return dataclasses.replace(rows, numbers=numbers.reshape(tensor.shape[:axes]))
    if numbers.dim() == len(rows.sizes):  # a sum over the rows of each sample
        for axes in range(numbers.dim() - 1, 0, -1):
            if numbers.shape[:axes] == tensor.shape[:axes]:
                outer = numbers.flatten(axes) // math.prod(rows.sizes[axes:])
                if bool((outer == outer[..., :1]).all()):
                    less = Rows(outer[..., 0], rows.sizes[:axes], rows.picks)
                    return None if _in_place(outer[..., 0], less.sizes) else less
    return rows.unknown() if tensor.dim() else None


def _in_place(numbers: Tensor, sizes: tuple[int, ...]) -> bool:
    count = math.prod(sizes)
    return numbers.numel() == count and torch.equal(numbers.flatten(), torch.arange(count, device=numbers.device))


def _put(tensor: Tensor, rows: Rows | None) -> None:
    if rows is not None:
        tensor.__dict__[_KEY] = rows
    else:
        tensor.__dict__.pop(_KEY, None)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _many(out: Any) -> bool:
    return isinstance(out, (tuple, list))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _flat(part)]
    if isinstance(value, dict):
        return [item for part in value.values() for item in _flat(part)]
    return [value]


def common(theirs: Rows, mine: Rows) -> tuple[Tensor, Tensor] | None:
    """Where the rows stand that both hold, once each; None where that cannot be said."""
    a, b = theirs.numbers, mine.numbers
    if a is None or b is None or theirs.sizes != mine.sizes:
        return None
    a, b = a.flatten(), b.flatten()
    if len(a.unique()) != len(a) or len(b.unique()) != len(b):
        return None
    first, second = a.argsort(), b.argsort()
    both = a[first][torch.isin(a[first], b)]
    return first[torch.searchsorted(a[first], both)], second[torch.searchsorted(b[second], both)]
