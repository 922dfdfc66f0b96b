"""The computations of a recorded network that a latency table knows, with where their lengths come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from ...dependency.axes import Axes, Axis
from ...dependency.state import Mask
from ...tracing.names import operator_name
from ...tracing.operators import (
    Kind,
    Matrices,
    Move,
    Product,
    Sliding,
    form_of,
    given,
    kind_of,
    operator_of,
    products_of,
    shape_of,
)
from ...tracing.work import macs_of
from .kernels import Kernel, Sample


@dataclasses.dataclass(frozen=True, eq=False)
class Length:
    """A length of a computation: some axes' lengths multiplied, divided by others'."""

    over: tuple[Axis, ...]
    under: tuple[Axis, ...] = ()

    @property
    def full(self) -> int:
        return math.prod(a.length for a in self.over) // math.prod(a.length for a in self.under)

    @property
    def groups(self) -> frozenset[int]:
        return frozenset[int]().union(*(a.groups for a in (*self.over, *self.under)))

    def value(self, kept: Sequence[Any]) -> Any:
        """At fractions kept of each group, numbers or arrays."""
        over = math.prod(a.value(kept) for a in self.over)
        return over / math.prod(a.value(kept) for a in self.under) if self.under else over

    def exact(self, axes: Axes, gone: Mask) -> float:
        """When these components are removed."""
        over = math.prod(axes.exact(a, gone) for a in self.over)
        under = math.prod(axes.exact(a, gone) for a in self.under)
        return over / under if under else over


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """One call: its kernel and, for each of the kernel's lengths, where it comes from."""

    kernel: Kernel
    lengths: tuple[Length, ...]

    @property
    def sample(self) -> Sample:
        """The call as it was recorded."""
        return Sample(self.kernel, tuple(length.full for length in self.lengths))

    @property
    def groups(self) -> frozenset[int]:
        return frozenset[int]().union(*(length.groups for length in self.lengths))


def units_of(nodes: Iterable[fx.Node], axes: Axes) -> tuple[list[Unit], list[fx.Node]]:
    """Units, and calls that only touch elements. Calls that compute but are of no kind that is measured are in neither:
    they are part of what the context says does not change."""
    units: list[Unit] = []
    light: list[fx.Node] = []
    for node in nodes:
        if node.op != "call_function" or node.meta.get("constant_value"):
            continue
        if not macs_of(node):
            if not _moves_nothing(node):
                light.append(node)
            continue
        units.extend(_units(node, axes))
        if kind_of(node) is Kind.ATTENTION:
            light.append(node)
    return units, light


def _moves_nothing(node: fx.Node) -> bool:
    """It only looks at its operand differently, or copies it, which kernels do along the way."""
    operator = operator_of(node)
    if operator is None:
        return operator_name(node) == "getitem"
    return operator.view or (operator.kind is Kind.MOVEMENT and operator.move in (Move.STAYS, Move.RESHAPES))


def _units(node: fx.Node, axes: Axes) -> list[Unit]:
    if kind_of(node) is Kind.ATTENTION:
        return _attention(node, axes)
    form = form_of(node)
    if isinstance(form, Sliding):
        return _convolution(node, axes)
    for product in products_of(node):
        along, made = product.data_axis, product.result_axis
        if along is not None and made is not None and _is_linear(product):
            rows, result = axes.of(product.data), axes.of(node)
            lead = tuple(axis for a, axis in enumerate(rows) if a != along)
            return [Unit(Kernel("linear"), (Length(lead), Length((rows[along],)), Length((result[made],))))]
    if isinstance(form, Matrices):
        left, right = given(node, form.left), given(node, form.left + 1)
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            a, b = axes.of(left), axes.of(right)
            if len(a) >= 2 and len(b) >= 2:
                lead = tuple(axes.of(node)[:-2])
                return [_product(lead, a[-2], a[-1], b[-1])]
    return []


def _is_linear(product: Product) -> bool:
    """A matrix of weights, which every row of the data is multiplied with."""
    return len(shape_of(product.weight)) == 2 and not product.left and _from_parameter(product.weight)


def _product(lead: tuple[Axis, ...], rows: Axis, inner: Axis, columns: Axis) -> Unit:
    return Unit(Kernel("matmul"), (Length(lead), Length((rows,)), Length((inner,)), Length((columns,))))


def _attention(node: fx.Node, axes: Axes) -> list[Unit]:
    operands = [n for n in node.args[:3] if isinstance(n, fx.Node)]
    if len(operands) < 3:
        return []
    query, key, value = (axes.of(n) for n in operands)
    lead = tuple(query[:-2])
    return [_product(lead, query[-2], query[-1], key[-2]), _product(lead, query[-2], key[-2], value[-1])]


def _from_parameter(node: fx.Node) -> bool:
    while node.op == "call_function" and _moves_nothing(node):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _convolution(node: fx.Node, axes: Axes) -> list[Unit]:
    product = next(iter(products_of(node)), None)
    form = form_of(node)
    if product is None or not isinstance(form, Sliding):
        return []
    stride, padding, dilation = (given(node, place) for place in (form.stride, form.padding, form.dilation))
    if isinstance(padding, str):
        return []
    transposed, groups, output_padding = product.transposed, product.groups, given(node, form.output_padding)
    x, w = axes.of(product.data), axes.of(product.weight)
    sites = tuple(a.length for a in x[2:])
    n = len(sites)
    inner, outer = (w[0], w[1]) if transposed else (w[1], w[0])  # transposed: (inputs, outputs per group, ...)
    multiplier = 1
    lengths: tuple[Length, ...]
    if groups == 1:
        op, lengths = "conv", (Length((x[1],)), Length((outer,)))
    elif groups == x[1].length:
        op, lengths = "depthwise", (Length((x[1],)),)
        multiplier = outer.length if transposed else outer.length // x[1].length
    elif transposed:
        return []
    else:
        count = Length((x[1],), (inner,))
        op, lengths = "grouped", (count, Length((inner,)), Length((outer, inner), (x[1],)))
    kernel = Kernel(
        op,
        (x[0].length, *sites),
        tuple(a.length for a in w[2:]),
        _numbers(stride, n),
        _numbers(padding, n),
        _numbers(dilation, n),
        bool(transposed),
        _numbers(output_padding, n) if transposed and any(_numbers(output_padding, n)) else (),
        multiplier,
    )
    return [Unit(kernel, lengths)]


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    listed = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(listed * count if len(listed) == 1 else listed)
