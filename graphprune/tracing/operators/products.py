"""The products of a call: which of its tensors it multiplies with which, and along which of their axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Sums over products of `data` with `weight`: along each of the weight's axes `reads`, what lies along `data_axis`
    of the data is summed; along each of `produces` lies what the sums give, on `result_axis` of the (first) result.

    Axes count from 0; `data_axis` and `result_axis` are None where they cannot be told. `slides`: axes of the weight
    that are summed over places too, a kernel's. `batch`: those of which each index has data of its own. `groups`: into
    how many parts the data's axis is cut, of which each result reads one. `bias`: what is added along the result's
    axis. `left`: the weight stands before the data. `scaled`: the sums are multiplied with a number.
    """

    data: fx.Node
    weight: fx.Node
    produces: tuple[int, ...]
    reads: tuple[int, ...]
    data_axis: int | None
    result_axis: int | None
    bias: Any = None
    slides: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    left: bool = False
    scaled: bool = False

    @property
    def fixed(self) -> bool:
        """Its weight does not depend on the network's input."""
        return self.weight.op == "get_attr" or bool(self.weight.meta.get("constant_value"))


class Form(Protocol):
    """How an operator's arguments make products. `rule`: the generic rule that reads it."""

    rule: ClassVar[str]

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        """Those of one recorded call."""


@functools.lru_cache(4096)
def positions(target: Any) -> Mapping[str, int]:
    """Where an operator takes its arguments, by name."""
    schema = getattr(target, "_schema", None) or getattr(getattr(target, "default", None), "_schema", None)
    return {a.name: i for i, a in enumerate(schema.arguments)} if schema is not None else {}


def argument(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], position: int) -> Any:
    """An argument by its place in the operator's schema, however it was passed; None where it was not."""
    if position < len(args):
        return args[position]
    if kwargs:
        places = positions(target)
        for name, value in kwargs.items():
            if places.get(name, places.get("self") if name == "input" else None) == position:  # what Python calls it
                return value
    return None


def given(node: fx.Node, position: int | None) -> Any:
    """`argument` of a recorded call."""
    return None if position is None else argument(node.target, node.args, node.kwargs, position)


def rank(node: Any) -> int:
    """The number of axes of a recorded tensor, the first of several."""
    return len(shape_of(node))


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a recorded tensor, of the first of several; () of anything else."""
    meta = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(meta, tuple):
        meta = meta[0] if meta else None
    return tuple(getattr(meta, "shape", ()))


def multiplied(node: fx.Node, product: Product, data: Tensor, weight: Tensor) -> Tensor:
    """What a recorded call makes of other data and another weight, without bias. It has no other tensors."""
    outputs = math.prod(weight.shape[a] for a in product.produces) * (product.groups if product.transposed else 1)
    places = [a for a in node.target._schema.arguments if given(node, positions(node.target)[a.name]) is product.bias]  # type: ignore[union-attr]
    optional = all(isinstance(a.type, torch.OptionalType) for a in places)

    def taken(value: Any) -> Any:
        if value is product.data:
            return data
        if value is product.weight:
            return weight
        return None if optional else data.new_zeros(outputs)

    args = fx.node.map_arg(node.args, taken)
    kwargs = fx.node.map_arg(node.kwargs, taken)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


def _scaled(node: fx.Node) -> bool:
    return "alpha" in node.kwargs or "beta" in node.kwargs


@dataclasses.dataclass(frozen=True)
class Matrices:
    """(..., m, k) times (..., k, n), the second behind the first among the arguments. Either may be the weight."""

    rule: ClassVar[str] = "<matrices>"
    left: int = 0
    bias: int | None = None

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        a, b, bias = given(node, self.left), given(node, self.left + 1), given(node, self.bias)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return ()
        found = []
        n, m, last = rank(a), rank(b), rank(node) - 1
        if m >= 2:
            found.append(Product(a, b, (m - 1,), (m - 2,), n - 1, last, bias, scaled=_scaled(node)))
        if n >= 2:
            inner, rows = max(m - 2, 0), last if m < 2 else last - 1
            found.append(Product(b, a, (n - 2,), (n - 1,), inner, rows, bias, left=True, scaled=_scaled(node)))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The last axis of the data, (..., in), times a matrix with an axis that reads it and one that produces."""

    rule: ClassVar[str] = "<layer>"
    data: int = 0
    weight: int = 1
    bias: int | None = 2
    produces: int = 0
    reads: int = 1

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        data, weight = given(node, self.data), given(node, self.weight)
        if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node) or rank(weight) != 2:
            return ()
        bias = given(node, self.bias)
        return (Product(data, weight, (self.produces,), (self.reads,), rank(data) - 1, rank(node) - 1, bias),)


@dataclasses.dataclass(frozen=True)
class Sliding:
    """A kernel (out, in / groups, ...) slides over (samples, in, ...); transposed: (in, out / groups, ...).

    `data`, `weight`, `bias`, `stride`, `padding`, `dilation`, `groups`, `output_padding`: places of arguments;
    `transposed`: one too, or whether it is.
    """

    rule: ClassVar[str] = "<sliding>"
    data: int = 0
    weight: int = 1
    bias: int = 2
    stride: int = 3
    padding: int = 4
    dilation: int = 5
    groups: int = 8
    transposed: int | bool = 6
    output_padding: int | None = 7

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        data, weight, bias = (given(node, place) for place in (self.data, self.weight, self.bias))
        if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node):
            return ()
        turned = self.turned(functools.partial(given, node))
        makes, reads = (1, 0) if turned else (0, 1)
        taps = tuple(range(2, rank(weight)))
        axis, groups = rank(data) - 1 - len(taps), int(given(node, self.groups) or 1)
        found = Product(data, weight, (makes,), (reads,), axis, axis, bias, taps, groups=groups, transposed=turned)
        return (found,)

    def turned(self, given: Callable[[int], Any]) -> bool:
        """Whether a call with these arguments is transposed."""
        return self.transposed if isinstance(self.transposed, bool) else bool(given(self.transposed))


@dataclasses.dataclass(frozen=True)
class ByStep:
    """A kernel (taps, in, out) slides over (steps, samples, in)."""

    rule: ClassVar[str] = "<by step>"
    def products(self, node: fx.Node) -> tuple[Product, ...]:
        data, weight, bias = (given(node, place) for place in range(3))
        return (Product(data, weight, (2,), (1,), 2, 2, bias, (0,)),)


@dataclasses.dataclass(frozen=True)
class Deformable:
    """As `Sliding`, but the places that a kernel reads are moved by another operand."""

    rule: ClassVar[str] = "<deformable>"

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        data, weight, bias, groups = (given(node, place) for place in (0, 1, 4, 11))
        return (Product(data, weight, (0,), (1,), 1, 1, bias, (2, 3), groups=int(groups)),)


@dataclasses.dataclass(frozen=True)
class Cells:
    """Recurrent layers: `gates` times as many rows as there are hidden units, in all matrices of weights but the
    projections."""

    rule: ClassVar[str] = "<cells>"
    gates: int

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        weights = given(node, positions(node.target)["params"])
        data = node.args[0]
        assert isinstance(data, fx.Node)
        return tuple(
            Product(data, w, (0,), (1,), None, None) for w in weights if isinstance(w, fx.Node) and rank(w) == 2
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table, (rows, width), looked up by number."""

    rule: ClassVar[str] = "<rows>"
    def products(self, node: fx.Node) -> tuple[Product, ...]:
        table, index = given(node, 0), given(node, 1)
        if not isinstance(table, fx.Node) or not isinstance(index, fx.Node) or rank(table) != 2:
            return ()
        return (Product(index, table, (1,), (), None, rank(node) - 1),)


@dataclasses.dataclass(frozen=True)
class Trilinear:
    """sum(a * b * c) over some axes of a joint space, in which each operand lacks some: what nn.Bilinear becomes."""

    rule: ClassVar[str] = "<trilinear>"
    def products(self, node: fx.Node) -> tuple[Product, ...]:
        operands = [given(node, place) for place in range(3)]
        lacking = [[int(d) for d in given(node, place)] for place in (3, 4, 5)]
        count = rank(operands[0]) + len(lacking[0])
        summed = {int(d) % count for d in given(node, 6)}
        homes = []  # of each operand, where its axes lie
        for missing in lacking:
            gone = {d % count for d in missing}
            homes.append([a for a in range(count) if a not in gone])
        found = []
        for i, weight in enumerate(operands):
            others = {a for j, home in enumerate(homes) if j != i for a in home}
            reads = tuple(axis for axis, a in enumerate(homes[i]) if a in summed and a in others)
            makes = tuple(axis for axis, a in enumerate(homes[i]) if a not in summed and a not in others)
            if reads and makes:
                data = operands[(i + 1) % 3 if i else 2]
                found.append(Product(data, weight, makes, reads, None, None))
        return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Declared:
    """What the rule of a user's operator says of a call, found out once for each."""

    rule: ClassVar[str] = "<declared>"
    find: Callable[[fx.Node], tuple[Product, ...]]

    def products(self, node: fx.Node) -> tuple[Product, ...]:
        known = node.meta.get("products")
        if known is None or known[0] is not self or known[1] is not node:  # a copied node has its original's
            known = node.meta["products"] = (self, node, self.find(node))
        found: tuple[Product, ...] = known[2]
        return found
