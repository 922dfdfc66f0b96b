"""Find the residual branches inside layers that can be left out alone: attention without its MLP, or the reverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ...errors import GraphPruneError
from ...tracing.example import ExampleInput
from ...tracing.names import operator_name
from ...tracing.operators import Kind, Merge, is_layer, kind_of, operator_of
from ...tracing.trace import record_run
from .blocks import Block, Call, Search, Watch, overlap, shape_of


def find_branches(model: nn.Module, example_input: Any) -> tuple[Block, ...]:
    """The residual branches of `model`: what is only added to a stream that went around it, in the order of their runs.

    From one recorded run. A branch is a module that is called once, computes something with weights, returns a tensor
    of the shape of its first floating point argument (or a tuple that begins with one), of which nothing but that
    result is read outside; and the result is added - after scaling, dropout or reshaping at most - to something of
    which its argument was computed by norms and the like, without weights that are summed over. Of nested ones the
    outermost.

    Or it is several such modules one behind the other, of whatever width between them: attention and a norm behind it,
    x + norm(attention(x)), or the layers of an MLP that the layer around them calls itself. Then all that is summed
    over weights on the way is in modules that can go, and what they make is read by the branch alone.
    """
    return search_branches(model, example_input)[0]


def search_branches(model: nn.Module, example_input: Any) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """What `find_branches` finds, and why the branches at other residual sums cannot be left out."""
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    watch = Watch(model)
    trace = record_run(model, ExampleInput.of(example_input), observe=watch.observing)
    search = _Branches(trace.graph, watch.calls, watch.modules)
    found = search.branches()
    return tuple(_block(calls) for calls in found), tuple(dict.fromkeys(search.reasons(found)))


class _Branches(Search):
    """Which of the recorded calls are residual branches, alone or together."""

    def branches(self) -> list[list[Call]]:
        """The modules of each branch, in the order of their runs."""
        order = list(self.calls)
        single = [[call] for call in self._outermost(c for p, c in self.calls.items() if p and self._is_branch(c))]
        several = sorted(self._spread(), key=lambda calls: (self._length(calls), _depth(calls[-1])))
        found: list[list[Call]] = []
        for calls in (*single, *several):
            if not any(overlap(a.path, b.path) for a in calls for other in found for b in other):
                found.append(calls)
        return sorted(found, key=lambda calls: order.index(calls[0].path))

    def _outermost(self, calls: Any) -> list[Call]:
        """Without those inside of others, in the order of their runs."""
        found: list[Call] = []
        for call in sorted(calls, key=_depth):
            if not any(overlap(call.path, other.path) for other in found):
                found.append(call)
        return sorted(found, key=lambda call: self._span(call))

    # -- one module

    def _is_branch(self, call: Call) -> bool:
        if not self._like_its_input(call) or not self._ends(call):
            return False
        known = self._before(call.inputs[0][1])
        return any(not self._works(known - self._before(stream)) for stream in self._streams(call.out, known))

    def _ends(self, call: Call) -> bool:
        """Its result has the type of its argument, and nothing else of it is read."""
        assert call.out is not None
        return call.out.meta["val"].dtype == call.inputs[0][1].meta["val"].dtype and self._shut(call)

    def _streams(self, result: fx.Node | None, known: set[fx.Node]) -> Iterator[fx.Node]:
        """What of the nodes `known` the result is added to, with nothing on the way that zeros would not pass."""
        node, added = result, False
        while node is not None and len(node.users) == 1:
            (user,) = node.users
            operator = operator_of(user)
            if operator is not None and operator.sums:
                for other in user.all_input_nodes:
                    if other in known and shape_of(other) == shape_of(node):
                        yield other
                        return
                added = True  # another branch was added first: no more zeros, but still a sum
            elif added or not _zeros_stay(user, node):
                return
            node = user

    def _works(self, nodes: set[fx.Node]) -> bool:
        return any(map(_works, nodes))

    # -- several modules

    def _spread(self) -> Iterator[list[Call]]:
        """Modules that are a branch together, in the order of their runs."""
        for path, call in self.calls.items():
            if path and self._called_once(call) and call.out is not call.inputs[0][1] and self._ends(call):
                for stream in self._streams(call.out, self._before(call.inputs[0][1])):
                    parts = self._parts(call, stream)
                    if parts:
                        yield [*parts, call]

    def _called_once(self, call: Call) -> bool:
        return not call.repeated and None not in (call.out, call.last, call.before) and bool(call.inputs)

    def _parts(self, end: Call, stream: fx.Node) -> list[Call]:
        """What has to go with `end`, whose result is added to `stream`; nothing where that cannot be said."""
        assert end.out is not None
        inner = self._before(end.out) - self._before(stream)
        can_go = [c for c in self.calls.values() if self._inside(c, end, inner)]
        sources = self._outermost(c for c in can_go if self._contractions(c))
        made = self._after(sources, inner)
        fed = (c for c in can_go if c.inputs[0][1] in made and any(True for _ in self.modules[c.path].parameters()))
        parts = self._outermost({c.path: c for c in (*sources, *fed)}.values())
        spans = [self._span(c) for c in (*parts, end)]
        inside = {self.nodes[i] for first, last in spans for i in range(first, last + 1)}
        alone = all(user in inner or user in inside for node in made if node is not end.out for user in node.users)
        first = all(shape_of(c.inputs[0][1]) == shape_of(stream) for c in parts if c.inputs[0][1] not in made)
        return parts if alone and first and not self._works(inner - inside) else []

    def _inside(self, call: Call, end: Call, inner: set[fx.Node]) -> bool:
        return (
            bool(call.path)
            and self._called_once(call)
            and call.out in inner
            and not overlap(call.path, end.path)
            and self._shut(call)
        )

    def _after(self, calls: list[Call], inner: set[fx.Node]) -> set[fx.Node]:
        """The nodes of `inner` that are results of these calls or computed from them."""
        found: set[fx.Node] = set()
        queue = [call.out for call in calls if call.out is not None]
        while queue:
            node = queue.pop()
            if node in inner and node not in found:
                found.add(node)
                queue.extend(node.users)
        return found

    # -- what is left

    def reasons(self, found: list[list[Call]]) -> Iterator[str]:
        """For every residual sum whose branch is not among those found, nor holds one of them."""
        ends = {calls[-1].out for calls in found}
        for node in self.nodes:
            operands = {a for a in node.all_input_nodes if shape_of(a) == shape_of(node)}
            operator = operator_of(node)
            if operator is not None and operator.sums and len(operands) == 2:
                stream, made = sorted(operands, key=self.at.__getitem__)
                around = self._before(made)
                inner = around - self._before(stream)
                if stream in around and self._works(inner) and not inner & ends:
                    yield self._reason(node, made, inner)

    def _reason(self, total: fx.Node, made: fx.Node, inner: set[fx.Node]) -> str:
        owner = self._owner(total)
        place = f"a branch of {owner.path if owner and owner.path else 'the model'} cannot be left out: "
        while _zeros_stay(made, None) and (back := [a for a in made.all_input_nodes[:1] if a in inner]):
            made = back[0]
        calls = (call for call in self.calls.values() if call.path and call.out is made)
        makers = [call for call in calls if all(node is not made for _, node in call.inputs)]
        if not makers:
            name = operator_name(made.all_input_nodes[0] if operator_name(made) == "getitem" else made)
            return f"{place}it ends in {name}, which is no module of its own and may make more than zeros"
        own = {operator_name(n) for n in inner & self._nodes_of(owner) if _works(n)}
        if own:
            return f"{place}it computes {', '.join(sorted(own))} itself; move that into a module"
        end = max(makers, key=_depth).path
        return f"{place}{end} or what it reads is called more than once, is read elsewhere too, or has another shape"

    def _owner(self, node: fx.Node) -> Call | None:
        """The innermost call that a node lies in."""
        around = [c for c in self.calls.values() if self._called_once(c) and self.at[node] in range(*self._range(c))]
        return max(around, key=lambda call: (_depth(call), len(call.path)), default=None)

    def _nodes_of(self, call: Call | None) -> set[fx.Node]:
        """What a call computes itself, not in modules below it."""
        first, end = (0, len(self.nodes)) if call is None else self._range(call)
        own = {self.nodes[i] for i in range(first, end)}
        below = [c for c in self.calls.values() if c.path != (call.path if call else "") and self._called_once(c)]
        for other in below:
            if call is None or not call.path or other.path.startswith(f"{call.path}."):
                own -= {self.nodes[i] for i in range(*self._range(other))}
        return own

    def _range(self, call: Call) -> tuple[int, int]:
        first, last = self._span(call)
        return first, last + 1

    def _length(self, calls: list[Call]) -> int:
        return self._span(calls[-1])[1] - self._span(calls[0])[0]


def _works(node: fx.Node) -> bool:
    """What may not be left to be computed from zeros, for nothing."""
    return is_layer(node) or kind_of(node) is Kind.ATTENTION


def _zeros_stay(node: fx.Node, zeros: fx.Node | None) -> bool:
    """Zeros go through it as zeros: products, and what moves or keeps values. `zeros`: which operand they are."""
    operator = operator_of(node)
    if operator is None or not (operator.zeros or operator.passes):
        return False
    return zeros is None or operator.merge is not Merge.QUOTIENT or node.args[0] is zeros


def _block(calls: list[Call]) -> Block:
    first, *rest = (Block(call.path, call.inputs[0][0], call.form, False, branch=True) for call in calls)
    return Block(first.module, first.stream, first.form, False, branch=True, parts=tuple(rest))


def _depth(call: Call) -> int:
    return call.path.count(".")


__all__ = ["find_branches"]
