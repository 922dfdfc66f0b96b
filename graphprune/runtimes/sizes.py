"""Sizes at which a file with free axes is tried: what torch has found out about them, and other sizes that fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
from sympy.solvers.solveset import NonlinearError

from ..errors import GraphPruneError
from .arguments import FlatArguments
from .dims import Dimension, Range, symbol
from .dynamic import FreeAxes

_TRIES = 64
Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Relations:
    """The sizes of the dims: which can be chosen, and what the others follow from.

    `free`: the dims that can be any size in `ranges`. `solved`: the size of each dim in terms of these.
    `limits`: what torch found about single axes, (tensor, axis): range. `notes`: what the caller did not ask for.
    """

    free: tuple[str, ...]
    solved: Mapping[str, sympy.Expr]
    limits: Mapping[tuple[int, int], Range]
    notes: tuple[str, ...] = ()


def relations(program: Any, free: FreeAxes, arguments: FlatArguments) -> Relations:
    """What the captured program says about the free axes.

    Raises:
        GraphPruneError: an axis that the caller named is not as free as that.
    """
    shapes, exported = _symbolic_shapes(program, len(arguments.tensors)), program.exported_program
    equations: list[sympy.Expr] = []
    limits: dict[tuple[int, int], Range] = {}
    notes: list[str] = []
    environment: Any = None
    for i, own in enumerate(free.axes):
        for axis, one in own.items():
            found: Any = shapes[i][axis] if i < len(shapes) else None
            if not hasattr(found, "node"):
                continue
            environment = found.node.shape_env
            equations.append(one.expression - found.node.expr)
            limit = _limit(exported.range_constraints.get(found.node.expr))
            limits[i, axis] = limit
            notes += _too_narrow(one, limit, free.ranges, f"axis {axis} of {arguments.names[i]!r}")
    equations += _asserted(environment)
    # The longest first: it is what others add up to.
    lengths = free.sizes(arguments.tensors)
    solved = _solve(equations, sorted(free.ranges, key=lambda name: (-lengths.get(name, 0), name)))
    left = {s for expression in solved.values() for s in expression.free_symbols}
    names = tuple(name for name in free.ranges if symbol(name) in left)
    return Relations(names, solved, limits, tuple(notes))


def other_sizes(free: FreeAxes, found: Relations, arguments: FlatArguments) -> list[dict[str, int]]:
    """Two further sizes of all dims at once, each another than the example's where it can be: larger, and smallest."""
    own = free.sizes(arguments.tensors)
    start = {name: own[name] if name in own else _implied(name, free, arguments) for name in found.free}
    larger = ({n: start[n] + k + i for i, n in enumerate(found.free)} for k in range(1, _TRIES))
    smallest = ({n: max(free.ranges[n][0], 1) + k for n in found.free} for k in range(_TRIES))
    chosen: list[dict[str, int]] = []
    for candidates in (larger, smallest):
        sizes = next(filter(None, (complete(one, free, found, arguments) for one in candidates)), None)
        if sizes is not None and sizes != own and sizes not in chosen:
            chosen.append(sizes)
    return chosen


def shapes_at(free: FreeAxes, arguments: FlatArguments, sizes: Mapping[str, int]) -> Shapes:
    """The shapes of the tensors where the dims have these sizes."""
    shapes = []
    for own, tensor in zip(free.axes, arguments.tensors, strict=True):
        shape = [int(size) for size in tensor.shape]
        for axis, one in own.items():
            shape[axis] = int(one.size(sizes))
        shapes.append(tuple(shape))
    return tuple(shapes)


def in_words(sizes: Mapping[str, int]) -> str:
    """ "batch 2, length 13"."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _implied(name: str, free: FreeAxes, arguments: FlatArguments) -> int:
    """The size of a dim that is no axis by itself, from an axis with it."""
    own = free.sizes(arguments.tensors)
    for axes, tensor in zip(free.axes, arguments.tensors, strict=True):
        for axis, one in axes.items():
            left = one.size({n: s for n, s in own.items() if n != name})
            if left.free_symbols == {symbol(name)}:
                size = next(iter(sympy.solve(left - int(tensor.shape[axis]), symbol(name))), None)
                return int(size) if size is not None and size.is_Integer else 1
    return 1


def complete(
    chosen: Mapping[str, int],
    free: FreeAxes,
    found: Relations,
    arguments: FlatArguments,
    *,
    least: int = 1,
    limited: bool = True,
) -> dict[str, int] | None:
    """The sizes of all dims, clipped to what the caller allows; None where they do not fit together, where one is less
    than `least`, or (`limited`) outside of what torch says."""
    clipped = {name: _clip(size, free.ranges[name]) for name, size in chosen.items()}
    values = {symbol(name): size for name, size in clipped.items()}
    sizes: dict[str, int] = {}
    for name, expression in found.solved.items():
        size = expression.subs(values)
        low, high = free.ranges[name]
        if not size.is_Integer or int(size) != _clip(int(size), (max(low, least), high)):
            return None
        sizes[name] = int(size)
    for (i, axis), limit in found.limits.items() if limited else ():
        size = free.axes[i][axis].size(sizes)
        if not size.is_Integer or int(size) != _clip(max(int(size), 0), limit):
            return None
    return {name: sizes[name] for name in free.ranges}


def _clip(size: int, limits: Range) -> int:
    low, high = limits
    return max(low, size if high is None else min(size, high))


def _symbolic_shapes(program: Any, count: int) -> list[Sequence[Any]]:
    """The shapes of the inputs in the exported program, sizes or symbols."""
    exported = program.exported_program
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)][:count]
    return [nodes[name].meta["val"].shape for name in names if name in nodes]


def _limit(found: Any) -> Range:
    if found is None:
        return (0, None)
    low, high = found.lower, found.upper
    return (int(low) if low.is_Integer else 0, int(high) if high.is_Integer else None)


def _too_narrow(one: Dimension, limit: Range, ranges: Mapping[str, Range], place: str) -> list[str]:
    """A note where torch's code knows an end of an axis that the caller did not ask for.

    Raises:
        GraphPruneError: the caller named the axis.
    """
    ends = [ranges[name][1] for name in one.dims]
    most = None if None in ends else one.size({name: ranges[name][1] or 0 for name in one.dims})
    if limit[1] is None or (most is not None and most <= limit[1]):
        return []
    if not one.named:
        return [f"{place} takes sizes up to {limit[1]}, as the model's code asks for that"]
    raise GraphPruneError(
        f"dynamic_shapes: {place} ({one.name!r}) cannot be of any size: the model's code goes another way above "
        f"{limit[1]}. Say so, as torch.export.Dim({one.dims[0]!r}, max=...)"
    )


def _asserted(environment: Any) -> Iterable[sympy.Expr]:
    """The equations between sizes that torch met while it ran the model."""
    if environment is None:
        return []
    found = [known.expr for many in environment.deferred_runtime_asserts.values() for known in many]
    equations = [e.lhs - e.rhs for e in found if isinstance(e, sympy.Eq)]
    return [*equations, *(name - value for name, value in environment.replacements.items())]


def _solve(equations: Sequence[sympy.Expr], names: Sequence[str]) -> dict[str, sympy.Expr]:
    """Each name in terms of as few names as the linear ones among the equations leave free."""
    unknown = [*sorted({s for e in equations for s in e.free_symbols} - {symbol(n) for n in names}, key=str)]
    unknown += [symbol(name) for name in names]
    linear = []
    for equation in equations:
        try:
            sympy.linear_eq_to_matrix([equation], unknown)
        except NonlinearError:
            continue
        linear.append(equation)
    found = sympy.linsolve(linear, unknown) if linear else sympy.FiniteSet(sympy.Tuple(*unknown))
    if not found:
        raise GraphPruneError("dynamic_shapes: the model relates its sizes in another way than these names do")
    (solution,) = found
    values = dict(zip(unknown, solution, strict=True))
    return {name: values[symbol(name)] for name in names}
