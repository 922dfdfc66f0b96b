"""Propagate coordinates through the recorded graph until nothing more needs factoring."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from ..tracing.operators import Kind, Sliding, form_of, given, operator_of
from ..tracing.origin import TensorSize
from ..tracing.recorder import Guard, TensorMeta
from ..tracing.trace import Trace
from .context import NodeContext, Result
from .dims import DimTable, Root
from .effects import (
    NO_EFFECTS,
    NOTHING_REWRITTEN,
    Effects,
    EqualCounts,
    Freeze,
    Reason,
    Rewritten,
    ScalarSite,
    SizeSite,
    Union,
)
from .rules import rule_for
from .rules.registry import Rule, unknown
from .state import Mask, Refine, State, Vector, sealed

# Every pass factors at least one Dim; networks need 1 to 5 passes. Past the limit, what still asks is frozen.
_MAX_PASSES = 60
_MAX_OWN = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The outcome: states of all nodes, what each node contributed, and the components of tied positions.

    `label[p]` is the component of global position p; component `label[0]` is the immovable one. `tied` are the
    components by ties alone, before freezing joined them. Nothing in it changes: `freezing` gives another analysis,
    which shares all that is equal.
    """

    trace: Trace
    dims: DimTable
    states: Mapping[fx.Node, Result]
    effects: Mapping[fx.Node, Effects]
    passes: int
    tied: Vector
    label: Vector
    extra_freezes: tuple[Freeze, ...] = ()
    rewritten: Rewritten = NOTHING_REWRITTEN

    def state(self, node: fx.Node) -> State:
        """The coordinates of a recorded tensor (without any, if the analysis gave it none)."""
        found = self.states.get(node)
        if isinstance(found, State):
            return found
        meta = node.meta.get("val")
        return State(meta.shape if isinstance(meta, TensorMeta) else ())

    @property
    def freezes(self) -> list[Freeze]:
        return [*(f for e in self.effects.values() for f in e.freezes), *self.extra_freezes]

    @property
    def sites(self) -> list[SizeSite]:
        return [s for e in self.effects.values() for s in e.sites]

    @property
    def scalars(self) -> list[ScalarSite]:
        return [s for e in self.effects.values() for s in e.scalars if s.node not in self.rewritten.nodes]

    @property
    def guards(self) -> list[Guard]:
        """What the code asked of its sizes, and what the kernels that it calls ask."""
        return [*self.trace.guards, *(g for e in self.effects.values() for g in e.guards)]

    @property
    def equal(self) -> list[EqualCounts]:
        return [s for e in self.effects.values() for s in e.equal]

    def freezing(self, items: Iterable[Freeze]) -> Analysis:
        """The same with more positions held; itself where nothing is to be held. No ties are resolved anew."""
        new = tuple(items)
        if not new:
            return self
        label = _held(self.label, (positions for positions, _ in new))
        return dataclasses.replace(self, label=label, extra_freezes=(*self.extra_freezes, *new))

    def tying(self, pairs: Iterable[tuple[Vector, Vector]]) -> Analysis:
        """The same with more positions tied, each with one other; itself where nothing is to be tied."""
        found = list(pairs)
        if not found:
            return self
        a, b = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
        tied = _also_tied(self.tied, self.tied[a], self.tied[b])
        return dataclasses.replace(self, tied=tied, label=_also_tied(self.label, self.label[a], self.label[b]))

    def rewriting(self, rewritten: Rewritten, guards: tuple[Guard, ...]) -> Analysis:
        """The same with the sizes of other modules free and these guards to be obeyed. What literals froze stays."""
        return dataclasses.replace(self, rewritten=rewritten, trace=dataclasses.replace(self.trace, guards=guards))

    @functools.cached_property
    def components(self) -> int:
        """One more than the largest component number."""
        return int(self.label.max()) + 1

    def components_of(self, positions: Iterable[Vector] = ()) -> Mask:
        """A mask over component numbers: those that any of these global positions belongs to."""
        return _marked(self.label, positions, self.components)

    def ties_of(self, positions: Iterable[Vector] = ()) -> Mask:
        """As `components_of`, by ties alone: what is frozen keeps numbers of its own."""
        return _marked(self.tied, positions)

    def free(self) -> Mask:
        """A mask over the component numbers of `tied`: those that can go."""
        out = self.ties_of()
        out[self.label] = True
        out[self.label[0]] = False
        return out

    def frozen(self, positions: Vector) -> Mask:
        """Which of these global positions cannot be removed."""
        return np.asarray(self.label[positions] == self.label[0])


def _marked(number: Vector, positions: Iterable[Vector], count: int | None = None) -> Mask:
    out: Mask = np.zeros(int(number.max()) + 1 if count is None else count, bool)
    for some in positions:
        out[number[some]] = True
    return out


def _held(number: Vector, positions: Iterable[Vector]) -> Vector:
    """The components joined with the immovable one, where they have any of these positions. The same array where none
    is new."""
    stuck = _marked(number, (np.zeros(1, np.int64), *positions))
    return number if np.count_nonzero(stuck) == 1 else sealed(np.where(stuck[number], number[0], number))


def _also_tied(number: Vector, a: Vector, b: Vector) -> Vector:
    """The components with those numbered `a` and `b` joined, one by one. Each has the lowest number of those that it is
    made of, but the immovable one keeps its own."""
    count = int(number.max()) + 1
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    found = connected_components(graph, directed=False)[1]
    lowest = np.full(int(found.max()) + 1, count)
    np.minimum.at(lowest, found, np.arange(count))
    lowest[found[number[0]]] = number[0]
    return sealed(lowest[found][number])


def _components(dims: DimTable, effects: Mapping[fx.Node, Effects]) -> Vector:
    """All ties resolved in one call of a sparse connected-components routine. Numbered by the first of their positions.

    Most ties are of two Dims as they are. These are joined first, and the first of such Dims stands for all."""
    whole, others = list[tuple[int, int]](), list[Union]()
    length = dims.lengths().tolist()
    for effect in effects.values():
        for union in effect.unions:
            dim, vector, other, _ = union
            if vector is union.others and length[dim] == len(vector) == length[other] and dims.counts(vector):
                whole.append((dim, other))
            else:
                others.append(union)
    offset = np.asarray([*dims.offset, dims.total], np.int64)
    first = _joined(len(length), whole)
    moved = np.concatenate([np.zeros(1, np.int64), np.repeat(offset[first] - offset[:-1], np.diff(offset))])
    stands = np.arange(dims.total) + moved
    u = stands[np.concatenate([np.zeros(1, np.int64), *(offset[t.dim] + t.coordinates for t in others)])]
    v = stands[np.concatenate([np.zeros(1, np.int64), *(offset[t.other] + t.others for t in others)])]
    graph = coo_matrix((np.ones(len(u), np.int8), (u, v)), shape=(dims.total, dims.total))
    label = connected_components(graph, directed=False)[1][stands]
    return sealed((np.cumsum(np.bincount(label) > 0) - 1)[label])


def _joined(count: int, pairs: Iterable[tuple[int, int]]) -> Vector:
    """For each of `count` things the first of those that it is joined with, itself where it is first."""
    first = list(range(count))
    for a, b in pairs:
        while first[a] != a:
            first[a] = a = first[first[a]]
        while first[b] != b:
            first[b] = b = first[first[b]]
        first[max(a, b)] = min(a, b)
    for thing in range(count):  # what stands there is no later thing, and has been looked up before
        first[thing] = first[first[thing]]
    return np.array(first, np.int64)


def _kernel_weights(nodes: list[fx.Node]) -> set[fx.Node]:
    """Parameters read by convolutions alone: their kernel axes need no coordinates at all."""
    found = set()
    for node in nodes:
        if node.op == "get_attr" and node.users and len(node.meta["val"].shape) > 2:
            if all(_is_kernel(node, user) for user in node.users):
                found.add(node)
    return found


def _is_kernel(node: fx.Node, user: fx.Node) -> bool:
    form = form_of(user)
    return isinstance(form, Sliding) and given(user, form.weight) is node


def analyse(trace: Trace, rewritten: Rewritten = NOTHING_REWRITTEN) -> Analysis:
    """Run all rules; repeat from the nodes whose operands changed while Dims are being factored."""
    nodes = list(trace.graph.nodes)
    run = _Propagation(trace, nodes, rewritten)
    passes = run.settle()
    held = [*run.unsettled(), *_plain_numbers(run.effects, trace)]
    tied = _components(run.dims, run.effects)
    label = _held(tied, (positions for e in run.effects.values() for positions, _ in e.freezes))
    found = Analysis(trace, run.dims, run.states, run.effects, passes, tied, label, rewritten=rewritten)
    return found.freezing(held)


def _plain_numbers(effects: Mapping[fx.Node, Effects], trace: Trace) -> Iterator[Freeze]:
    """`y * float(y.mean())`: a number that the code reads out of a tensor is lost sight of. It must stay what it is, so
    nothing may go that a mean, a norm or a softmax on the way to it runs over."""
    for node in trace.calls.get(Kind.READING, ()):
        meta = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
        if not getattr(meta, "dtype", torch.bool).is_floating_point:
            continue
        seen, todo = set[fx.Node](), [node]
        while todo:
            for source in todo.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        found = [p for n in trace.graph.nodes if n in seen for p in effects[n].statistics]
        if found:
            reason = Reason("values", "a number that the code reads from a tensor depends on all of them", node)
            yield np.unique(np.concatenate(found)), reason


def _states(value: Result) -> list[State]:
    return [s for s in (value if isinstance(value, list) else [value]) if isinstance(s, State)]


def _followers(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each tensor the calls that take a size from it: they follow it without reading it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        sizes = node.meta.get("sizes")
        if sizes is not None:
            for source in {e.node for e in sizes.values if isinstance(e, TensorSize)}.difference(node.all_input_nodes):
                found.setdefault(source, []).append(node)
    return found


class _Propagation:
    """The states and effects of all nodes as they come about, in passes over the graph."""

    def __init__(self, trace: Trace, nodes: list[fx.Node], rewritten: Rewritten) -> None:
        self.trace, self.nodes, self.rewritten = trace, nodes, rewritten
        self.dims = DimTable()
        self.states: dict[fx.Node, Result] = {}
        self.effects: dict[fx.Node, Effects] = {}
        self._rules: dict[int, Rule] = {}  # by operator: many nodes call few
        self._kernels = _kernel_weights(nodes)
        self._order = {node: i for i, node in enumerate(nodes)}
        self._followers = _followers(nodes)

    def settle(self) -> int:
        """Pass over the graph until nothing asks for factors any more. The number of passes."""
        # where a root's coordinates come from
        homes = {f"<{node.name}>": node for node in self.nodes} | self.trace.parameters
        dirty: Iterable[fx.Node] = self.nodes
        for passes in range(1, _MAX_PASSES + 1):
            refines = self._propagate(dirty, passes == 1)
            if not refines or passes == _MAX_PASSES:
                break
            changed: set[Root] = set()
            for request in refines.values():
                if self.dims.size[request.dim]:
                    changed.add(self.dims.refine(request))
            # whatever else mentions a factored Dim reads it from these parameters, and is reached through their users
            dirty = {n for n, e in self.effects.items() if e.refines} | {homes[name] for name, _ in changed}
        return passes

    def unsettled(self) -> Iterator[Freeze]:
        """Ties of calls that still ask for factors are missing: everything that they touch stays."""
        for node, effect in self.effects.items():
            if effect.refines:
                reason = Reason("factoring", "the factors of its operands never settled", node)
                around = (node, *node.all_input_nodes)
                for dim in {d for n in around for s in _states(self.states.get(n)) for d in s.dims()}:
                    yield self.dims.positions(dim), reason

    def _propagate(self, dirty: Iterable[fx.Node], everything: bool) -> dict[int, Refine]:
        """Visit the dirty nodes, and from them on every node whose operands changed, in graph order."""
        refines: dict[int, Refine] = {}
        order, states = self._order, self.states
        queued = set(dirty)
        heap = sorted(map(order.__getitem__, queued))
        while heap:
            node = self.nodes[heapq.heappop(heap)]
            before = states.get(node)
            self._visit(node)
            for _ in range(_MAX_OWN):
                if not self.effects[node].refines or not self._factor_own(node):
                    break
                self._visit(node)
            for request in self.effects[node].refines:
                refines.setdefault(request.dim, request)
            if not everything and not _same(before, states.get(node)):
                for user in (*node.users, *self._followers.get(node, ())):
                    if user not in queued:
                        queued.add(user)
                        heapq.heappush(heap, order[user])
        return refines

    def _factor_own(self, node: fx.Node) -> bool:
        """Factor at once what a call asks for in its own parameters, where nothing has read them before (the scale of a
        norm, the bias of a layer): it saves a pass over the network. True when the call has to be looked at again."""
        again = False
        for request in self.effects[node].refines:
            root = self.dims.root_of[request.dim]
            if root not in self.dims.roots:
                continue
            parameter = self.trace.parameters[root[0]]
            if parameter in node.all_input_nodes and all(u is node or u not in self.effects for u in parameter.users):
                self.dims.refine(request)
                self.states[parameter] = _parameter(parameter, self.dims, parameter in self._kernels)
                again = True
        return again

    def _visit(self, node: fx.Node) -> None:
        """Run the rule of one node: its state and its effects."""
        states = self.states
        if node.op in ("get_attr", "placeholder"):
            here = node.op == "get_attr"
            states[node] = _parameter(node, self.dims, node in self._kernels) if here else State(node.meta["val"].shape)
            self.effects[node] = NO_EFFECTS
            return
        rule = self._rules.get(id(node.target))
        if rule is None and node.op == "call_function":
            rule = self._rules[id(node.target)] = rule_for(node.target)
        context = NodeContext(node, states, self.dims, self.rewritten)
        if rule is None:  # the model's output
            for value in node.all_input_nodes:
                made = NodeContext(value, states, self.dims)  # the line that makes it is the one to name
                made.effects = context.effects
                made.freeze_state(context.state(value), "output", "part of the model's output")
        elif node.target is operator.getitem:
            source = states[node.args[0]]  # type: ignore[index]
            states[node] = source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
        else:
            try:
                states[node] = rule(context)
            except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                # A call in a form its rule does not know: never raise, never guess
                context.effects = Effects()
                states[node] = unknown(context, f"{context.operation} in a form its rule does not know ({error})")
        self.effects[node] = context.effects


def _same(a: Result, b: Result) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, State) and isinstance(b, State):
        if a.shape != b.shape or a.axes.keys() != b.axes.keys():
            return False
        return all(
            m.keys() == b.axes[x].keys() and all(_equal(v, b.axes[x][d]) for d, v in m.items())
            for x, m in a.axes.items()
        )
    return a is None and b is None


def _equal(a: Vector, b: Vector) -> bool:
    return a is b or np.array_equal(a, b)


def _zero_point(node: fx.Node) -> bool:
    """Integers, one per channel, that go where their channels go."""
    places = [(user, operator_of(user)) for user in node.users]
    return bool(places) and all(found is not None and given(user, found.numbers) is node for user, found in places)


def _parameter(node: fx.Node, dims: DimTable, kernel: bool) -> State:
    meta: TensorMeta = node.meta["val"]
    name = node.meta.get("parameter")
    if name is None or not (meta.dtype.is_floating_point or meta.dtype.is_complex or _zero_point(node)):
        return State(meta.shape)
    axes = {}
    for axis, length in enumerate(meta.shape):
        if length > 1 and not (kernel and axis >= 2):
            axes[axis] = dims.roots.get((name, axis)) or dims.add_root(name, axis, length)
    return State(meta.shape, axes)
