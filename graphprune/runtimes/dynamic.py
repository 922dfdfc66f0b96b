"""Which axes of the inputs are free: `dynamic_shapes` of `torch.export`, for the flat inputs of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import GraphPruneError
from ..support.settings import is_plain_object
from ..support.suggestions import did_you_mean
from ..tracing.containers import is_holder
from .arguments import FlatArguments, parts_of, unique
from .dims import Dimension, Range, dimension, symbol

Axes = dict[int, Dimension]


@dataclasses.dataclass(frozen=True)
class FreeAxes:
    """The free axes of each tensor of a call, and the least and largest sizes of the dims that they are made of.

    `asked`: whether `dynamic_shapes` says so, and not the batch alone.
    """

    axes: tuple[Axes, ...]
    ranges: Mapping[str, Range]
    asked: bool = False

    @classmethod
    def none(cls, arguments: FlatArguments) -> FreeAxes:
        """Nothing is free."""
        return cls(tuple({} for _ in arguments.tensors), {})

    @classmethod
    def batch(cls, arguments: FlatArguments) -> FreeAxes:
        """The first axis of every tensor that shares the batch."""
        first = Dimension("batch", symbol("batch"), {"batch": (1, None)})
        return cls(tuple({0: first} if batched else {} for batched in arguments.batched), dict(first.ranges))

    @classmethod
    def of(cls, dynamic_shapes: Any, arguments: FlatArguments, *, dynamic_batch: bool) -> FreeAxes:
        """What the caller asks for; the batch too with `dynamic_batch`, where nothing is said of it.

        Raises:
            GraphPruneError: an argument, an axis or a value that cannot be, or a dim that is of two lengths in the
                example.
        """
        said = _Matching(arguments).matched(dynamic_shapes)
        axes: list[Axes] = []
        for name, tensor, own in zip(arguments.names, arguments.tensors, said, strict=True):
            found = {axis: _dimension(value, name, axis, int(tensor.shape[axis])) for axis, value in own.items()}
            axes.append({axis: one for axis, one in sorted(found.items()) if one is not None})
        shared = zip(axes, said, arguments.batched, strict=True)
        if dynamic_batch and not any(0 in own for _, own, batched in shared if batched):
            taken = {d for own in axes for one in own.values() for d in one.dims}
            (name,) = unique(["batch"], taken)
            first = Dimension(name, symbol(name), {name: (1, None)})
            axes = [{0: first, **own} if b else own for own, b in zip(axes, arguments.batched, strict=True)]
        free = cls(tuple(axes), _ranges(axes), asked=True)
        free.sizes(arguments.tensors)  # one length for each dim
        return free

    @property
    def any(self) -> bool:
        """Whether one axis is free."""
        return any(self.axes)

    def names(self) -> tuple[dict[int, str] | None, ...]:
        """For each tensor, the names of its free axes in the file."""
        return tuple({axis: one.name for axis, one in own.items()} or None for own in self.axes)

    def frees_batch(self, arguments: FlatArguments) -> bool:
        """Whether the first axis of every tensor that shares the batch is free."""
        batched = [own for own, b in zip(self.axes, arguments.batched, strict=True) if b]
        return bool(batched) and all(0 in own for own in batched)

    def described(self, arguments: FlatArguments) -> dict[str, dict[int, str]]:
        """The names of the free axes of each input that has any."""
        return {name: own for name, own in zip(arguments.names, self.names(), strict=True) if own}

    def without(self, places: Sequence[tuple[int, int]]) -> FreeAxes:
        """The same with these (tensor, axis) fixed."""
        kept = [{a: one for a, one in own.items() if (i, a) not in places} for i, own in enumerate(self.axes)]
        return dataclasses.replace(self, axes=tuple(kept), ranges=_ranges(kept))

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The sizes of the dims that are an axis of their own, in these tensors.

        Raises:
            GraphPruneError: one dim has two.
        """
        found: dict[str, tuple[int, int, int]] = {}
        for i, (own, tensor) in enumerate(zip(self.axes, tensors, strict=True)):
            for axis, one in own.items():
                size = int(tensor.shape[axis])
                if one.expression.is_Symbol and found.setdefault(str(one.expression), (size, i, axis))[0] != size:
                    raise GraphPruneError(
                        f"dynamic_shapes: {one.name!r} is {found[str(one.expression)][0]} and {size} long in "
                        f"example_input; axes of one name have one length"
                    )
        return {name: size for name, (size, _, _) in found.items()}


def _dimension(value: Any, name: str, axis: int, size: int) -> Dimension | None:
    return dimension(value, f"axis {axis} of {name!r}", f"{name}_{axis}", size)


def _ranges(axes: Sequence[Axes]) -> dict[str, Range]:
    """The range of each dim: what all axes with it allow."""
    found: dict[str, Range] = {}
    for one in (one for own in axes for one in own.values()):
        for name, (low, high) in one.ranges.items():
            before = found.get(name, (0, None))
            highs = [h for h in (before[1], high) if h is not None]
            found[name] = (max(before[0], low), min(highs) if highs else None)
    return found


class _Matching:
    """Walks through a specification and the arguments side by side."""

    def __init__(self, arguments: FlatArguments) -> None:
        self.arguments = arguments
        self.found: list[dict[int, Any]] = [{} for _ in arguments.tensors]
        self.seen = 0
        self.places: dict[int, tuple[int, int]] = {}  # argument: its tensors, from and to
        values = [*arguments.example.args, *arguments.example.kwargs.values()]
        for i, value in enumerate(values):
            before = self.seen
            self._walk(None, value, arguments.roots[i])
            self.places[i] = (before, self.seen)
        self.values = values

    def matched(self, dynamic_shapes: Any) -> list[dict[int, Any]]:
        """{axis: value} for each tensor."""
        roots = self.arguments.roots
        if isinstance(dynamic_shapes, Mapping):
            for name, spec in dynamic_shapes.items():
                if name in roots:
                    self._argument(roots.index(name), spec)
                elif name in self.arguments.names:
                    place = self.arguments.names.index(name)
                    self._tensor(spec, place, str(name))
                else:
                    known = list(dict.fromkeys([*roots, *self.arguments.names]))
                    raise GraphPruneError(
                        f"dynamic_shapes: there is no input {name!r}{did_you_mean(str(name), known)}; there are "
                        f"{', '.join(known)}"
                    )
        elif isinstance(dynamic_shapes, (tuple, list)):
            if len(dynamic_shapes) != len(roots):
                raise GraphPruneError(
                    f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(roots)} arguments "
                    f"({', '.join(roots)}); give one for each, None where all is fixed"
                )
            for i, spec in enumerate(dynamic_shapes):
                self._argument(i, spec)
        else:
            raise GraphPruneError(
                f"dynamic_shapes must be a dict by the names of arguments or a tuple by their position, got "
                f"{type(dynamic_shapes).__name__}"
            )
        return self.found

    def _argument(self, i: int, spec: Any) -> None:
        self.seen = self.places[i][0]
        self._walk(spec, self.values[i], self.arguments.roots[i])

    def _walk(self, spec: Any, value: Any, path: str, inside: bool = False) -> None:
        if isinstance(value, Tensor):
            self.seen += 1
            if spec is not None:
                self._tensor(spec, self.seen - 1, path)
            return
        inside = inside or is_holder(value, False)
        parts = parts_of(value, objects=inside)
        if inside and spec is not None:
            _check_no_counts(value, parts, path)
        for (key, item), own in zip(parts, _distributed(spec, parts, path), strict=True):
            self._walk(own, item, f"{path}[{key!r}]", inside)

    def _tensor(self, spec: Any, place: int, path: str) -> None:
        rank = self.arguments.tensors[place].ndim
        if isinstance(spec, (tuple, list)):
            if len(spec) != rank:
                raise GraphPruneError(
                    f"dynamic_shapes: {path} has {rank} axes, and {len(spec)} are given; give one for each, or a dict"
                )
            spec = dict(enumerate(spec))
        if spec is None:
            return
        if not isinstance(spec, Mapping):
            raise GraphPruneError(
                f"dynamic_shapes: {path} is a tensor; give {{axis: name}}, such as {{1: 'length'}}, got {spec!r}"
            )
        for axis, value in spec.items():
            if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
                raise GraphPruneError(
                    f"dynamic_shapes: {path} has no axis {axis!r}; its {rank} axes are 0 to {rank - 1}"
                    if rank else f"dynamic_shapes: {path} is a number and has no axis {axis!r}"
                )  # fmt: skip
            self.found[place][axis % rank] = value


def _distributed(spec: Any, parts: Sequence[tuple[Any, Any]], path: str) -> list[Any]:
    """What is said of each part of a tuple, list, dict or object.

    `{axis: dim}` in the place of a whole stands for every tensor in it.
    """
    if spec is None or not parts:
        return [None] * len(parts)
    keys = [key for key, _ in parts]
    if isinstance(spec, Mapping):
        by_axis = all(isinstance(key, int) for key in spec)
        if by_axis and (keys == list(range(len(keys))) or not set(spec) <= set(keys)):
            return [spec if _holds_tensors(item) else None for _, item in parts]
        unknown = [key for key in spec if key not in keys]
        if unknown:
            known = [str(key) for key in keys]
            raise GraphPruneError(
                f"dynamic_shapes: {path} has no part {unknown[0]!r}{did_you_mean(str(unknown[0]), known)}; it has "
                f"{', '.join(known)}"
            )
        return [spec.get(key) for key in keys]
    if isinstance(spec, (tuple, list)):
        if len(spec) != len(parts):
            raise GraphPruneError(f"dynamic_shapes: {path} has {len(parts)} parts, and {len(spec)} are given")
        return list(spec)
    raise GraphPruneError(f"dynamic_shapes: {path} is no tensor but holds some; give its structure, got {spec!r}")


def _check_no_counts(value: Any, parts: Sequence[tuple[Any, Any]], path: str) -> None:
    """Numbers in a cache that nothing is known of count what its tensors hold, and would stay what they are."""
    counts = [str(key) for key, item in parts if type(item) is int]
    if counts and is_plain_object(value):
        raise GraphPruneError(
            f"dynamic_shapes: {path} ({type(value).__name__}) keeps numbers beside its tensors ({', '.join(counts)}), "
            f"which would stay what they are in the example; register the class of the cache with torch.utils._pytree "
            f"(transformers.integrations.executorch.register_dynamic_cache_export_support() does so for DynamicCache)"
        )


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    return depth < 16 and any(_holds_tensors(item, depth + 1) for _, item in parts_of(value, objects=True))
