"""Find the residual branches inside layers that can be left out alone: attention without its MLP, or the reverse."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..errors import GraphPruneError
from ..tracing.example import ExampleInput
from ..tracing.names import operator_name
from ..tracing.trace import record_run
from .blocks import CONTRACTIONS, Block, Call, Search, Watch, overlap, shape_of

_SUMS = frozenset(("add", "add_", "sub", "sub_"))
# Zeros go through these as zeros: products, and what moves or keeps values.
_ZERO_STAYS = frozenset(
    "mul mul_ div div_ neg clone alias detach _to_copy contiguous native_dropout view _unsafe_view reshape flatten "
    "unflatten squeeze unsqueeze transpose permute t".split()
)


def find_branches(model: nn.Module, example_input: Any) -> tuple[Block, ...]:
    """The modules of `model` whose result is only added to a stream that went around them, in the order of their runs.

    From one recorded run: modules that are called once, compute something with weights, return a tensor of the shape
    of their first floating point argument (or a tuple that begins with one), of which nothing but that result is read
    outside; and the result is added - after scaling, dropout or reshaping at most - to something of which their
    argument was computed by norms and the like, without weights that are summed over. Of nested ones the outermost.
    """
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    watch = Watch(model)
    trace = record_run(model, ExampleInput.of(example_input), observe=watch.observing)
    return tuple(_Branches(trace.graph, watch.calls, watch.modules).blocks())


class _Branches(Search):
    """Which of the recorded calls are residual branches."""

    def blocks(self) -> list[Block]:
        found: list[str] = []
        for path in sorted((p for p, call in self.calls.items() if p and self._is_branch(call)), key=_depth):
            if not any(overlap(path, other) for other in found):
                found.append(path)
        calls = [self.calls[path] for path in sorted(found, key=list(self.calls).index)]
        return [Block(call.path, call.inputs[0][0], call.form, False, branch=True) for call in calls]

    def _is_branch(self, call: Call) -> bool:
        if call.out is None or not self._like_its_input(call):
            return False
        x = call.inputs[0][1]
        if call.out.meta["val"].dtype != x.meta["val"].dtype or not self._shut(call):
            return False
        known = self._before(x)
        stream = self._stream(call.out, known)
        return stream is not None and not self._computes(known - self._before(stream))

    def _stream(self, result: fx.Node, known: set[fx.Node]) -> fx.Node | None:
        """What of the nodes `known` the result is added to, with nothing on the way that zeros would not pass."""
        node, added = result, False
        while len(node.users) == 1:
            (user,) = node.users
            name = operator_name(user)
            if name in _SUMS:
                for other in user.all_input_nodes:
                    if other in known and shape_of(other) == shape_of(node):
                        return other
                added = True  # another branch was added first: no more zeros, but still a sum
            elif added or name not in _ZERO_STAYS or (name.startswith("div") and user.args[0] is not node):
                return None
            node = user
        return None

    def _computes(self, nodes: set[fx.Node]) -> bool:
        return any(operator_name(node) in CONTRACTIONS for node in nodes)


def _depth(path: str) -> int:
    return path.count(".")


__all__ = ["find_branches"]
