"""Where the pruned network is compared with the dense one: the ends of its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ....importance.calibration import Reader
from ....support.walking import named_tensors
from ....tracing.operators import Declared, Layer, Matrices, Merge, Sliding, function_name, named
from ....tracing.trace import Trace
from .. import walk


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor of a run: what the layer with this weight makes, or with `sum`, that added to what went around it.

    `axis`: that of the channels, from the end. `target`: what of the dense network's it should be. `after`: the
    parameters that it depends on.
    """

    weight: str
    sum: bool
    axis: int
    target: walk.Target
    after: frozenset[str]

    def wanted(self, dense: Tensor) -> Tensor:
        """The values that it should have, from those in the dense network."""
        return self.target.of(dense, dense.dim() + self.axis)


def find_places(trace: Trace, readers: Sequence[Reader], targets: Mapping[str, walk.Target]) -> list[Place]:
    """The ends of the blocks of a residual network, which are sums of what layers make and what went around them;
    where nothing is added, the results of all layers. `readers`: those of `trace`, the pruned network's."""
    depends = _parameters_behind(trace)
    sums = any(r.adds for r in readers if r.weight in targets)
    found = []
    for reader in readers:
        if reader.weight not in targets or (sums and not reader.adds):
            continue
        users = [user for user in trace.parameters[reader.weight].users if user.op == "call_function"]
        node = next(iter(users[-1].users)) if sums else users[-1]
        found.append(Place(reader.weight, sums, reader.result_axis, targets[reader.weight], depends[node]))
    return found


def _parameters_behind(trace: Trace) -> dict[fx.Node, frozenset[str]]:
    names = {node: name for name, node in trace.parameters.items()}
    found: dict[fx.Node, frozenset[str]] = {}
    for node in trace.graph.nodes:
        own = frozenset((names[node],)) if node in names else frozenset()
        behind = [found[a] for a in node.all_input_nodes]
        found[node] = own.union(*behind) if len(behind) != 1 or own else behind[0]
    return found


class Watch(TorchFunctionMode):
    """Keeps what a network makes at its places while it runs, with gradients. `made`: by weight, call by call."""

    def __init__(self, model: nn.Module, places: Iterable[Place]) -> None:
        super().__init__()
        tensors = named_tensors(model)
        self._places = {id(tensors[place.weight]): place for place in places}
        self._waiting: list[tuple[Tensor, Place]] = []
        self.made: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = named(function_name(func))
        place = None
        if operator is not None and operator.merge is Merge.SUM and len(args) == 2:
            place = self._ending(args)
        elif operator is not None and isinstance(operator.form, (Declared, Layer, Matrices, Sliding)):
            given = [*args, *(kwargs or {}).values()]
            place = next((self._places[id(a)] for a in given if id(a) in self._places), None)
            if place is not None and place.sum:
                out = func(*args, **(kwargs or {}))
                self._waiting.append((out, place))
                return out
        out = func(*args, **(kwargs or {}))
        if place is not None:
            self.made.setdefault(place.weight, []).append(out)
        return out

    def _ending(self, operands: tuple[Any, ...]) -> Place | None:
        """The place whose layer made one of these operands of a sum."""
        for number, (made, place) in enumerate(self._waiting):
            if operands[0] is made or operands[1] is made:
                del self._waiting[number]
                return place
        return None
