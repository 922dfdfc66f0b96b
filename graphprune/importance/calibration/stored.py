"""What the statistics that a network stores say about its activations: means and variances, without any data.

A batch norm in eval mode makes, per channel, results of mean beta and variance gamma^2 var / (var + eps) over the data
that its statistics were taken from. From there means and variances are carried through the recorded run: data movement
moves them, a linear layer or a convolution sums them (inputs as independent, borders as they are), and a function of
single elements takes them through the integral of a normal distribution. What nothing is known of is NaN: a network's
input, and what is computed from it before a batch norm.

A layer norm makes, over its features taken together, results of mean 0 and variance 1 before scale and shift. Of each
feature alone that is an assumption: good enough to rank units by, and said of spreads only where `assume` asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...plans.surgery.folding import stored_norms
from ...tracing.names import operator_name
from ...tracing.operators import (
    Kind,
    Merge,
    Move,
    Operator,
    is_layer,
    multiplied,
    positions,
    products_of,
    shape_of,
)
from ...tracing.recorder import TensorMeta
from ...tracing.trace import Trace
from .layers import Reader, find_readers

_REACH = 9.0  # standard deviations: nothing that counts lies beyond
_EDGES = (-_REACH, -3.0, 0.0, 3.0, _REACH)
_CHUNK = 1 << 15  # elements integrated at a time
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)

Function = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Mean and variance of every element of a tensor, over data; NaN where unknown.

    `root`: the tensor, taken as normal, that this is a function of element by element, if it is one; `function`: that
    function; `bends`: of the root's values, where it is not smooth.
    """

    mean: Tensor
    variance: Tensor
    root: Spread | None = None
    function: Function | None = None
    bends: tuple[float, ...] = ()

    @functools.cached_property
    def fixed(self) -> bool:
        """It is the same whatever the data are."""
        return not bool(_compact(self.variance)[0].any())

    @property
    def base(self) -> Spread:
        return self if self.root is None else self.root

    def at(self, points: Tensor) -> Tensor:
        """Its values where the root has these."""
        return points if self.function is None else self.function(points)


def stored_spreads(
    trace: Trace, tensors: Mapping[str, Tensor], upto: frozenset[fx.Node], assume: bool = False
) -> dict[fx.Node, Spread]:
    """The spreads of these nodes. `tensors`: parameters and buffers by name. `assume`: every feature of a layer norm
    is like all of them together."""
    norms = set(stored_norms(trace))
    sources = norms | set(trace.calls.get(Kind.LAYER_NORM, ()) if assume else ())
    informed = _informed(trace, sources)
    wanted = _needed(upto, informed, sources)
    found: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in trace.graph.nodes:
            if node in wanted:
                visit = _Visit(node, found, tensors, trace, node in norms, assume)
                found[node] = _slim(visit.result() if node in informed or node.op == "get_attr" else visit.unknown())
    return {node: found[node] for node in upto if isinstance(found.get(node), Spread)}


def _slim(made: Any) -> Any:
    if isinstance(made, list):
        return [_slim(one) for one in made]
    if not isinstance(made, Spread):
        return made
    return dataclasses.replace(made, mean=_pressed(made.mean), variance=_pressed(made.variance))


def _informed(trace: Trace, sources: set[fx.Node]) -> set[fx.Node]:
    """The results of norms, and what is computed from them: nothing is known of anything else."""
    out: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if node in sources or not out.isdisjoint(node.all_input_nodes):
            out.add(node)
    return out


def _needed(nodes: frozenset[fx.Node], informed: set[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    """These and all that they are computed from, back to norms and to what nothing is known of."""
    todo, seen = list(nodes), set(nodes)
    while todo:
        node = todo.pop()
        if node not in informed or node in sources:
            continue  # a norm's own tensors are looked up by name
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def _norm_places(node: fx.Node) -> tuple[int, int, int, int]:
    """Where a batch norm that takes its stored statistics has scale, shift, running variance and eps."""
    places = positions(node.target)
    return 1, 2, 4, places["eps" if "eps" in places else "epsilon"]


class _Visit:
    """One node: its spread from those of what it reads."""

    def __init__(
        self,
        node: fx.Node,
        found: dict[fx.Node, Any],
        tensors: Mapping[str, Tensor],
        trace: Trace,
        norm: bool,
        assume: bool,
    ) -> None:
        self.node, self.found, self.tensors, self.trace, self.assume = node, found, tensors, trace, assume
        self.norm, self.operator = norm, trace.lines.get(node)

    def result(self) -> Any:
        node = self.node
        if node.op == "get_attr":
            name = node.meta.get("parameter")
            value = self.tensors.get(name) if name is not None else self.trace.constants.get(str(node.target))
            return self.unknown() if value is None or value.is_meta else _constant(value.detach())
        if node.op != "call_function":
            return self.unknown()
        if node.target is operator.getitem:
            source = self.found.get(node.args[0])  # type: ignore[arg-type]
            return source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
        try:
            made = self._called()
        except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            made = None  # a form that is not known here
        return self.unknown() if made is None else made

    def unknown(self) -> Any:
        """What is said of a node that nothing is known of."""
        meta = self.node.meta.get("val")
        if isinstance(meta, tuple):
            return [_nothing(m.shape) if isinstance(m, TensorMeta) else None for m in meta]
        return _nothing(meta.shape) if isinstance(meta, TensorMeta) else None

    def _operands(self) -> list[Spread]:
        return [s for n in self.node.all_input_nodes if isinstance(s := self.found.get(n), Spread)]

    def _called(self) -> Any:
        if self.norm:
            return self._normalised(_norm_places(self.node))
        if self.operator is not None and self.operator.kind is Kind.LAYER_NORM:
            return self._like_all_features() if self.assume else None
        operands = self._operands()
        if len(operands) != len(self.node.all_input_nodes) or not operands:
            return None
        operator = self.operator
        if operator is None:
            return None
        if operator.move is Move.STAYS:
            return operands[0]
        if operator.move is not None:
            return self._moved(operator)
        if operator.averages:  # of places, of which each is as the others: of the variance it is an upper bound
            return Spread(self._on("mean"), self._on("variance"))
        if is_layer(self.node):
            return self._summed()
        return self._pointwise(operator, operands) if operator.kind is Kind.POINTWISE else None

    def _normalised(self, places: tuple[int, int, int, int]) -> Any:
        scale, shift, variance, eps = (self.node.args[p] for p in places)
        meta = self.node.meta["val"]
        several = isinstance(meta, tuple)
        shape = tuple((meta[0] if several else meta).shape)
        stored = self._value(variance)
        if stored is None:
            return None
        mean = self._value(shift)
        gamma = self._value(scale)
        spread = stored / (stored + float(eps))  # type: ignore[arg-type]
        spread = spread if gamma is None else spread * gamma.square()
        mean = torch.zeros_like(stored) if mean is None else mean
        view = (1, -1) + (1,) * (len(shape) - 2)
        made = Spread(mean.reshape(view).expand(shape), spread.reshape(view).expand(shape))
        return [made, *(None,) * (len(meta) - 1)] if several else made

    def _like_all_features(self) -> Any:
        meta = self.node.meta["val"]
        several = isinstance(meta, tuple)
        shape = tuple((meta[0] if several else meta).shape)
        scale, shift = (self._value(a) for a in [*self.node.args[2:4], None, None][:2])
        one = torch.ones((), dtype=torch.float64)
        variance = one if scale is None else scale.square()
        mean = torch.zeros_like(one) if shift is None else shift
        made = Spread(mean.expand(shape), variance.expand(shape))
        return [made, *(None,) * (len(meta) - 1)] if several else made

    def _value(self, node: Any) -> Tensor | None:
        name = node.meta.get("parameter") if isinstance(node, fx.Node) else None
        tensor = self.tensors.get(name) if name is not None else None
        return None if tensor is None else tensor.detach().double()

    def _on(self, part: str, arguments: Sequence[Any] | None = None) -> Any:
        """The very same call, on the means or the variances of what it reads."""

        def taken(value: Any) -> Any:
            return getattr(self.found[value], part) if isinstance(value, fx.Node) else value

        args = fx.node.map_aggregate(self.node.args if arguments is None else arguments, taken)
        kwargs = fx.node.map_aggregate(self.node.kwargs, taken)
        kwargs = {k: torch.float64 if k == "dtype" and v is not None else v for k, v in kwargs.items()}
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def _moved(self, operator: Operator) -> Any:
        if operator_name(self.node) == "constant_pad_nd":
            value = float(self.node.args[2]) if len(self.node.args) > 2 else 0.0  # type: ignore[arg-type]
            mean = self._on("mean")
            return Spread(mean, self._on("variance", [*self.node.args[:2], 0.0])) if value == value else None
        if operator.move is Move.RESHAPES:  # what is broadcast cannot be viewed
            data, shape = self._operands()[0], shape_of(self.node)
            return Spread(data.mean.reshape(shape), data.variance.reshape(shape))
        mean, variance = self._on("mean"), self._on("variance")
        if isinstance(mean, (list, tuple)):
            return [Spread(m, v) for m, v in zip(mean, variance, strict=True)]
        return Spread(mean, variance)

    def _summed(self) -> Spread | None:
        """Products summed: operands but the data are fixed."""
        product = next((p for p in products_of(self.node) if self.found[p.weight].fixed), None)
        if product is None or product.scaled or product.result_axis is None:
            return None
        others = [node for node in self.node.all_input_nodes if node is not product.data]
        if not all(self.found[node].fixed and node in (product.weight, product.bias) for node in others):
            return None
        mean, data = self._on("mean"), self.found[product.data]
        if data.fixed:
            return Spread(mean, torch.zeros_like(mean))
        squares = self.found[product.weight].mean.square()
        return Spread(mean, multiplied(self.node, product, data.variance, squares))

    def _pointwise(self, operator: Operator, operands: list[Spread]) -> Spread | None:
        random = [s for s in operands if not s.fixed]
        roots = {id(s.base): s.base for s in random}
        if not random:
            mean = self._on("mean")
            return Spread(mean, torch.zeros_like(mean))
        if len(roots) == 1 and all(s.mean.numel() == 1 or s in random for s in operands):
            return self._function(next(iter(roots.values())), random)
        if operator.sums and len(self.node.args) == 2 and not self.node.kwargs and len(operands) == 2:
            a, b = operands
            sign = 1.0 if operator.merge is Merge.SUM else -1.0
            mean = _together(lambda x, y: x + sign * y, a.mean, b.mean)
            return Spread(mean, _together(torch.add, a.variance, b.variance))
        if operator.scales and len(operands) == 2 and not self.node.kwargs:
            return self._product(operator, *(self.found[a] for a in self.node.args[:2]))  # type: ignore[index]
        return None

    def _product(self, operator: Operator, a: Spread, b: Spread) -> Spread | None:
        if operator.merge is Merge.QUOTIENT:
            if not b.fixed:
                return None
            variance = _together(lambda v, m: v / m.square(), a.variance, b.mean)
            return Spread(_together(torch.div, a.mean, b.mean), variance)
        variance = _together(
            lambda v, w, m, n: v * w + v * n.square() + w * m.square(), a.variance, b.variance, a.mean, b.mean
        )
        return Spread(_together(torch.mul, a.mean, b.mean), variance)

    def _function(self, root: Spread, random: list[Spread]) -> Spread:
        """A function of each element of one tensor."""
        node, found = self.node, self.found

        def function(points: Tensor) -> Tensor:
            def at(value: Any) -> Any:
                if not isinstance(value, fx.Node):
                    return value
                spread = found[value]
                return spread.mean.double().reshape(()) if spread.fixed else spread.at(points)

            args = fx.node.map_aggregate(node.args, at)
            kwargs = fx.node.map_aggregate(node.kwargs, at)
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
            return result

        # bends of the outer function are those of the root only where nothing lies between
        own: tuple[float, ...] = ()
        if all(s.function is None for s in random):
            own = self._clip() or (() if self.operator is None else self.operator.bends)
        bends = tuple(sorted({*own, *(b for s in random for b in s.bends)}))
        ends = self._clip() if random[0].function is None else None
        if ends is not None:
            mean, variance = clipped(root.mean, root.variance, *ends)
        else:
            mean, variance = integrate(_safe(function), root.mean, root.variance, bends)
        return Spread(mean, variance, root, function, bends)

    def _clip(self) -> tuple[float, float] | None:
        """The ends between which this call clips, None where it is another one."""
        ends, given = None if self.operator is None else self.operator.clips, self.node.args[1:]
        if ends is None or self.node.kwargs or len(given) not in (0, 2):
            return None
        low, high = given or ends
        known = isinstance(low, (int, float)) and isinstance(high, (int, float)) and not math.isnan(low)
        return (float(low), float(high)) if known else None  # type: ignore[arg-type]


def _safe(function: Function) -> Function:
    return lambda points: function(points.clone())  # some calls write into what they read


def clipped(mean: Tensor, variance: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for normal x, in closed form; `high` may be infinite."""
    shape, (m, v) = mean.shape, _compact(mean.double(), variance.double())
    s = v.clamp_min(0).sqrt()
    ends = [(end - m) / s.clamp_min(1e-12) for end in (low, high)]
    (below, first_density), (under, last_density) = (
        (torch.special.ndtr(z), torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)) for z in ends
    )
    inside = under - below
    first = low * below + m * inside + s * (first_density - last_density)
    second = low**2 * below + (m.square() + v) * inside + s * ((m + low) * first_density - m * last_density)
    if math.isfinite(high):
        first = first + high * (1 - under)
        second = second + high**2 * (1 - under) - s * high * last_density
    return first.expand(shape), (second - first.square()).clamp_min(0).expand(shape)


def integrate(function: Function, mean: Tensor, variance: Tensor, bends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and variance of `function` of normal numbers, element by element: Gauss-Legendre between the bends.

    What is the same along an axis (a broadcast one) is computed once.
    """
    shape, (m, v) = mean.shape, _compact(mean.double(), variance.double())
    small = m.shape
    m, s = m.reshape(-1), v.reshape(-1).clamp_min(0).sqrt()
    parts = [_integrated(function, a, b, bends) for a, b in zip(m.split(_CHUNK), s.split(_CHUNK), strict=True)]
    first, second = (torch.cat(part).reshape(small).expand(shape) for part in zip(*parts, strict=True))
    return first, (second - first.square()).clamp_min(0)


def _integrated(function: Function, m: Tensor, s: Tensor, bends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """First and second moment of the function's results."""
    width = s.clamp_min(1e-12)
    places = [*(torch.full_like(m, z) for z in _EDGES), *(((b - m) / width).clamp(-_REACH, _REACH) for b in bends)]
    edges = torch.stack(places).sort(0).values
    nodes, weights = torch.from_numpy(_NODES).to(m.device), torch.from_numpy(_WEIGHTS).to(m.device)
    first, second = torch.zeros_like(m), torch.zeros_like(m)
    for low, high in itertools.pairwise(edges):
        half, middle = (high - low) / 2, (high + low) / 2
        z = middle[:, None] + half[:, None] * nodes
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * weights * half[:, None]
        values = function(m[:, None] + s[:, None] * z)
        first += (values * density).sum(1)
        second += (values.square() * density).sum(1)
    return first, second


def _compact(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape, without the copies along axes on which all of them are broadcast."""
    strides = zip(*[t.stride() for t in tensors], strict=True)
    index = tuple([slice(None) if any(along) else slice(0, 1) for along in strides])
    return [t[index] for t in tensors]


def _pressed(tensor: Tensor) -> Tensor:
    """Broadcast along every axis on which nothing changes, so that what follows has less to compute."""
    shape, (small,) = tensor.shape, _compact(tensor)
    for axis in range(small.dim()):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if bool(((small == first) | (small.isnan() & first.isnan())).all()):
                small = first
    return small.expand(shape)


def _together(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of tensors element by element, under broadcasting, computed once where they are broadcast."""
    wide = torch.broadcast_tensors(*tensors)
    return function(*_compact(*wide)).expand(wide[0].shape)


class StoredStatistics:
    """What each layer of one network reads, by what the network stores; found out when first asked for."""

    def __init__(self, trace: Trace, tensors: Mapping[str, Tensor]) -> None:
        self._trace, self._tensors = trace, tensors

    @functools.cached_property
    def _variances(self) -> dict[str, Tensor]:
        readers = find_readers(self._trace)
        read = {r.weight: read_by(next(iter(self._trace.parameters[r.weight].users))) for r in readers}
        spreads = stored_spreads(self._trace, self._tensors, frozenset(read.values()), assume=True)
        out = {}
        for reader in readers:
            spread = spreads.get(read[reader.weight])
            if spread is not None:
                out[reader.weight] = by_input(reader, spread.variance, self._tensors[reader.weight])
        return out

    @functools.cached_property
    def factors(self) -> frozenset[str]:
        """Parameters and buffers of which all that happens is that others are multiplied with them, element by
        element."""
        products = {n for n, line in self._trace.lines.items() if line.merge is Merge.PRODUCT}
        named = self._trace.parameters.items()
        return frozenset(name for name, node in named if node.users and products.issuperset(node.users))

    def variance(self, weight: str) -> Tensor | None:
        """Variances of what a linear layer or convolution reads, one per index of its weight's input axis, over data,
        samples and places; NaN where unknown, None for what is no such layer. Behind layer norms they are assumed."""
        return self._variances.get(weight)


def read_by(call: fx.Node) -> fx.Node:
    """The data that a call of a layer reads."""
    return products_of(call)[0].data


def by_input(reader: Reader, variance: Tensor, weight: Tensor) -> Tensor:
    """A number for every element that a layer reads, as one per index of its weight's input axis."""
    axis = variance.dim() + reader.data_axis
    (small,) = _compact(variance)
    channels = small.movedim(axis, 0).reshape(small.shape[axis], -1).mean(1).expand(variance.shape[axis])
    return channels.reshape(-1, weight.shape[reader.in_axis]).mean(0)  # groups count their inputs alike


def _constant(value: Tensor) -> Spread:
    value = value.double() if value.is_floating_point() else value
    return Spread(value, torch.zeros((), dtype=torch.float64).expand(value.shape))


def _nothing(shape: Sequence[int]) -> Spread:
    unknown = torch.full((), float("nan"), dtype=torch.float64).expand(tuple(shape))
    return Spread(unknown, unknown)


__all__ = ["Spread", "StoredStatistics", "by_input", "clipped", "integrate", "read_by", "stored_spreads"]
