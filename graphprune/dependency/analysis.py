"""Propagate coordinates through the recorded graph until nothing more needs factoring."""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Iterable

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from ..tracing.operators import Kind, Sliding, form_of, given, kind_of, operator_of
from ..tracing.origin import TensorSize
from ..tracing.recorder import Guard, TensorMeta
from ..tracing.trace import Trace
from .context import NodeContext, Result
from .dims import DimTable, Root
from .effects import Effects, EqualCounts, Reason, ScalarSite, SizeSite
from .rules import rule_for
from .rules.registry import unknown
from .state import Mask, Refine, State, Vector

# Every pass factors at least one Dim; networks need 1 to 5 passes. Past the limit, what still asks is frozen.
_MAX_PASSES = 60
_MAX_OWN = 8


@dataclasses.dataclass
class Analysis:
    """The outcome: states of all nodes, what each node contributed, and the components of tied positions.

    `label[p]` is the component of global position p; component `label[0]` is the immovable one. `tied` are the
    components by ties alone, before freezing joined them.
    """

    trace: Trace
    dims: DimTable
    states: dict[fx.Node, Result]
    effects: dict[fx.Node, Effects]
    passes: int
    label: Vector = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))
    extra_freezes: list[tuple[Vector, Reason]] = dataclasses.field(default_factory=list)
    tied: Vector | None = None

    def state(self, node: fx.Node) -> State:
        """The coordinates of a recorded tensor (without any, if the analysis gave it none)."""
        found = self.states.get(node)
        if isinstance(found, State):
            return found
        meta = node.meta.get("val")
        return State(meta.shape if isinstance(meta, TensorMeta) else ())

    @property
    def freezes(self) -> list[tuple[Vector, Reason]]:
        return [f for e in self.effects.values() for f in e.freezes] + self.extra_freezes

    @property
    def sites(self) -> list[SizeSite]:
        return [s for e in self.effects.values() for s in e.sites]

    @property
    def scalars(self) -> list[ScalarSite]:
        return [s for e in self.effects.values() for s in e.scalars if not s.node.meta.get("rewritten")]

    @property
    def guards(self) -> list[Guard]:
        """What the code asked of its sizes, and what the kernels that it calls ask."""
        return [*self.trace.guards, *(g for e in self.effects.values() for g in e.guards)]

    @property
    def equal(self) -> list[EqualCounts]:
        return [s for e in self.effects.values() for s in e.equal]

    def connect(self) -> None:
        """Resolve all ties in one call of a sparse connected-components routine; components with a frozen position
        join the immovable one. Freezing more positions later resolves no ties anew."""
        if self.tied is None:
            pairs = [u for e in self.effects.values() for u in e.unions]
            u = np.concatenate([a for a, _ in pairs]) if pairs else np.zeros(0, np.int64)
            v = np.concatenate([b for _, b in pairs]) if pairs else np.zeros(0, np.int64)
            total = self.dims.total
            graph = coo_matrix((np.ones(len(u), np.int8), (u, v)), shape=(total, total))
            self.tied = connected_components(graph, directed=False)[1].astype(np.int64)
        stuck = self.ties_of([np.zeros(1, np.int64), *(positions for positions, _ in self.freezes)])
        self.label = np.where(stuck[self.tied], self.tied[0], self.tied)

    @property
    def components(self) -> int:
        """One more than the largest component number."""
        return int(self.label.max()) + 1

    def components_of(self, positions: Iterable[Vector] = ()) -> Mask:
        """A mask over component numbers: those that any of these global positions belongs to."""
        return _marked(self.label, positions)

    def ties_of(self, positions: Iterable[Vector] = ()) -> Mask:
        """As `components_of`, by ties alone: what is frozen keeps numbers of its own."""
        assert self.tied is not None
        return _marked(self.tied, positions)

    def frozen(self, positions: Vector) -> Vector:
        """Which of these global positions cannot be removed."""
        return np.asarray(self.label[positions] == self.label[0])


def _marked(number: Vector, positions: Iterable[Vector]) -> Mask:
    out: Mask = np.zeros(int(number.max()) + 1, bool)
    for some in positions:
        out[number[some]] = True
    return out


def _kernel_weights(graph: fx.Graph) -> set[fx.Node]:
    """Parameters read by convolutions alone: their kernel axes need no coordinates at all."""
    found = set()
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            if all(_is_kernel(node, user) for user in node.users):
                found.add(node)
    return found


def _is_kernel(node: fx.Node, user: fx.Node) -> bool:
    form = form_of(user)
    return isinstance(form, Sliding) and given(user, form.weight) is node


def analyse(trace: Trace) -> Analysis:
    """Run all rules; repeat from the nodes whose operands changed while Dims are being factored."""
    dims = DimTable()
    env: dict[fx.Node, Result] = {}
    effects: dict[fx.Node, Effects] = {}
    kernels = _kernel_weights(trace.graph)
    analysis = Analysis(trace, dims, env, effects, 0)
    nodes = list(trace.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    followers = _followers(nodes)
    homes = {f"<{node.name}>": node for node in nodes} | trace.parameters  # where a root's coordinates come from
    dirty: set[fx.Node] = set(nodes)
    for passes in range(1, _MAX_PASSES + 1):
        analysis.passes = passes
        refines = _propagate(analysis, nodes, order, dirty, kernels, followers)
        if not refines:
            break
        if passes == _MAX_PASSES:
            continue
        changed: set[Root] = set()
        for request in refines.values():
            if dims.size[request.dim]:
                changed.add(dims.refine(request))
        # whatever else mentions a factored Dim reads it from these parameters, and is reached through their users
        dirty = {n for n, e in effects.items() if e.refines} | {homes[name] for name, _ in changed}
    else:
        # ties of these calls are missing: everything they touch stays
        for node, effect in effects.items():
            if effect.refines:
                reason = Reason("factoring", "the factors of its operands never settled", node)
                for dim in {d for n in (node, *node.all_input_nodes) for s in _states(env.get(n)) for d in s.dims()}:
                    analysis.extra_freezes.append((dims.positions(dim), reason))
    _hold_plain_numbers(analysis, nodes)
    analysis.connect()
    return analysis


def _hold_plain_numbers(analysis: Analysis, nodes: list[fx.Node]) -> None:
    """`y * float(y.mean())`: a number that the code reads out of a tensor is lost sight of. It must stay what it is, so
    nothing may go that a mean, a norm or a softmax on the way to it runs over."""
    for node in nodes:
        meta = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
        if kind_of(node) is not Kind.READING or not getattr(meta, "dtype", torch.bool).is_floating_point:
            continue
        seen, todo = set[fx.Node](), [node]
        while todo:
            for source in todo.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        found = [p for n in nodes if n in seen for p in analysis.effects[n].statistics]
        if found:
            reason = Reason("values", "a number that the code reads from a tensor depends on all of them", node)
            analysis.extra_freezes.append((np.unique(np.concatenate(found)), reason))


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


def _propagate(
    analysis: Analysis,
    nodes: list[fx.Node],
    order: dict[fx.Node, int],
    dirty: set[fx.Node],
    kernels: set[fx.Node],
    followers: dict[fx.Node, list[fx.Node]],
) -> dict[int, Refine]:
    """Visit the dirty nodes, and from them on every node whose operands changed, in graph order."""
    refines: dict[int, Refine] = {}
    env, effects = analysis.states, analysis.effects
    heap = sorted(order[n] for n in dirty)
    queued = set(dirty)
    while heap:
        node = nodes[heapq.heappop(heap)]
        before = env.get(node)
        _visit(node, analysis, kernels)
        for _ in range(_MAX_OWN):
            if not _factor_own(node, analysis, kernels):
                break
            _visit(node, analysis, kernels)
        for request in effects[node].refines:
            refines.setdefault(request.dim, request)
        if analysis.passes > 1 and not _same(before, env.get(node)):
            for user in (*node.users, *followers.get(node, ())):
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(heap, order[user])
    return refines


def _same(a: Result, b: Result) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, State) and isinstance(b, State):
        if a.shape != b.shape or a.axes.keys() != b.axes.keys():
            return False
        return all(
            m.keys() == b.axes[x].keys() and all(np.array_equal(v, b.axes[x][d]) for d, v in m.items())
            for x, m in a.axes.items()
        )
    return a is None and b is None


def _factor_own(node: fx.Node, analysis: Analysis, kernels: set[fx.Node]) -> bool:
    """Factor at once what a call asks for in its own parameters, where nothing has read them before (the scale of a
    norm, the bias of a layer): it saves a pass over the network. True when the call has to be looked at again."""
    env, effects, dims = analysis.states, analysis.effects, analysis.dims
    again = False
    for request in effects[node].refines:
        root = dims.root_of[request.dim]
        if root not in dims.roots:
            continue
        parameter = analysis.trace.parameters[root[0]]
        if parameter in node.all_input_nodes and all(u is node or u not in effects for u in parameter.users):
            dims.refine(request)
            env[parameter] = _parameter(parameter, dims, parameter in kernels)
            again = True
    return again


def _visit(node: fx.Node, analysis: Analysis, kernels: set[fx.Node]) -> None:
    """Run the rule of one node: its state and its effects."""
    env = analysis.states
    context = NodeContext(node, env, analysis.dims)
    if node.op == "get_attr":
        env[node] = _parameter(node, analysis.dims, node in kernels)
    elif node.op == "placeholder":
        env[node] = State(node.meta["val"].shape)
    elif node.op == "output":
        for value in node.all_input_nodes:
            made = NodeContext(value, env, analysis.dims)  # the line that makes it is the one to name
            made.effects = context.effects
            made.freeze_state(context.state(value), "output", "part of the model's output")
    elif node.target is operator.getitem:
        source = env[node.args[0]]  # type: ignore[index]
        env[node] = source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
    else:
        try:
            env[node] = rule_for(node.target)(context)
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # A call in a form its rule does not know: never raise, never guess
            context.effects = Effects()
            env[node] = unknown(context, f"{context.operation} in a form its rule does not know ({error})")
    analysis.effects[node] = context.effects


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
