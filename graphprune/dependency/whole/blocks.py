"""Find the layers that can be left out as a whole: modules with one input and one output of the same shape."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from ...errors import GraphPruneError
from ...tracing.example import ExampleInput
from ...tracing.operators import Merge, is_layer, operator_of
from ...tracing.recorder import Recorder
from ...tracing.trace import record_run


@dataclasses.dataclass(frozen=True)
class Block:
    """A layer that can be left out.

    `module`: its path. `stream`: the argument that becomes its result, a position or the name of a keyword. `form`: 0
    where it returns a tensor, else the length of the tuple it returns, whose first item is the stream. `listed`: an
    element of a Sequential or a ModuleList, which gets shorter; other modules become a `Bypass` of this library.
    `branch`: what it returns is added to a stream that went around it: it becomes a `Silence`, and
    `stream` is the argument whose shape its zeros have. `parts`: where a branch is more than one module, those that
    follow, in the order of their runs, each to be replaced in the same way; what the last one returns is added.
    """

    module: str
    stream: int | str
    form: int
    listed: bool
    branch: bool = False
    parts: tuple[Block, ...] = ()

    @property
    def pieces(self) -> tuple[Block, ...]:
        """It and its parts, as blocks of one module each."""
        return (dataclasses.replace(self, parts=()), *self.parts) if self.parts else (self,)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all its modules."""
        return (self.module, *(part.module for part in self.parts))

    def holds(self, path: str) -> bool:
        """Whether a module or parameter goes with it."""
        return any(path == own or path.startswith(f"{own}.") for own in self.modules)

    @classmethod
    def from_dict(cls, data: Any) -> Block:
        """From `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for anything else."""
        stream, form = data["stream"], data["form"]
        place = isinstance(stream, str) or (type(stream) is int and stream >= 0)
        if not isinstance(data["module"], str) or not place or type(form) is not int or not 0 <= form < 1000:
            raise ValueError(f"no layer: {data!r}")
        branch, parts = bool(data.get("branch", False)), tuple(map(cls.from_dict, data.get("parts", ())))
        if parts and not (branch and all(part.branch and not part.parts for part in parts)):
            raise ValueError(f"no layer: {data!r}")
        return cls(data["module"], stream, form, bool(data["listed"]), branch, parts)


@dataclasses.dataclass
class Call:
    """One call of a module in the recorded run; nodes lie after `before`, up to `last`."""

    path: str
    parent: Call | None
    before: fx.Node | None
    inputs: list[tuple[int | str, fx.Node]]  # floating point tensors among the arguments
    first: fx.Node | None  # the first tensor among the arguments, of whatever type
    last: fx.Node | None = None
    out: fx.Node | None = None
    form: int = 0
    extra: bool = False  # other results than the stream
    repeated: bool = False


class Watch:
    """Notes every module's call while the recorder runs."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.calls: dict[str, Call] = {}
        self.stack: list[Call] = []

    @contextlib.contextmanager
    def observing(self, recorder: Recorder) -> Iterator[None]:
        self.calls, self.stack = {}, []
        handles = []
        for path, module in recorder.modules.items():
            handles.append(module.register_forward_pre_hook(self._entering(path, recorder), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(recorder)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str, recorder: Recorder) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not recorder.here:
                return
            named = [(key, v) for key, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)]
            inputs = [(key, recorder.node_of(value)) for key, value in named if value.is_floating_point()]
            first = recorder.node_of(named[0][1]) if named else None
            before = next(iter(reversed(recorder.graph.nodes)), None)
            call = Call(path, self.stack[-1] if self.stack else None, before, inputs, first)
            if path in self.calls:
                call.repeated = self.calls[path].repeated = True
            else:
                self.calls[path] = call
            self.stack.append(call)

        return enter

    def _leaving(self, recorder: Recorder) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if not recorder.here:
                return
            call = self.stack.pop()
            first = out
            if type(out) in (tuple, list) and out:
                first, call.form, call.extra = out[0], len(out), any(item is not None for item in out[1:])
            if isinstance(first, Tensor) and first.is_floating_point():
                call.out = recorder.node_of(first)
            call.last = next(iter(reversed(recorder.graph.nodes)), None)  # after the node of an item of its last result

        return leave


class Search:
    """Which of the recorded calls are blocks."""

    def __init__(self, graph: fx.Graph, calls: dict[str, Call], modules: dict[str, nn.Module]) -> None:
        self.nodes = list(graph.nodes)
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.calls, self.modules = calls, modules

    def blocks(self) -> list[Block]:
        eligible = {path: call for path, call in self.calls.items() if path and self._eligible(call)}
        chosen: list[str] = []
        for wanted in (self._composite, self._element, self._attribute):
            found = [path for path in eligible if wanted(path, eligible)]
            for path in sorted(found, key=lambda p: p.count(".")):  # the outermost ones
                if not any(overlap(path, other) for other in chosen):
                    chosen.append(path)
        order = list(self.calls)
        return [self._block(eligible[path]) for path in sorted(chosen, key=order.index)]

    def _block(self, call: Call) -> Block:
        stream = call.inputs[0][0]
        return Block(call.path, stream, call.form, self._listed(call.path))

    # -- choosing among nested ones

    def _listed(self, path: str) -> bool:
        owner = self.modules.get(path.rpartition(".")[0])
        plain = isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward
        return plain or isinstance(owner, nn.ModuleList)

    def _composite(self, path: str, eligible: dict[str, Call]) -> bool:
        """An element, itself made of modules, of a list in which others can go too (or with no such elements in it)."""
        if not self._listed(path) or not any(True for _ in self.modules[path].children()):
            return False
        owner = path.rpartition(".")[0]
        siblings = [p for p in eligible if p.rpartition(".")[0] == owner]
        inside = [p for p in eligible if p.startswith(path + ".") and self._listed(p) and self._large(p)]
        chain = type(self.modules[path]).forward is nn.Sequential.forward  # a stage: its blocks are the layers
        return not inside or (len(siblings) > 1 and not chain)

    def _element(self, path: str, eligible: dict[str, Call]) -> bool:
        return self._listed(path)

    def _attribute(self, path: str, eligible: dict[str, Call]) -> bool:
        return self._contractions(eligible[path]) > 1

    def _large(self, path: str) -> bool:
        return any(True for _ in self.modules[path].children())

    # -- one call

    def _like_its_input(self, call: Call) -> bool:
        """Called once, computes something with weights, and returns a tensor of the shape of its first argument."""
        if call.repeated or call.out is None or call.last is None or not call.inputs or call.before is None:
            return False
        x = call.inputs[0][1]
        same = x is not call.out and shape_of(x) is not None and shape_of(x) == shape_of(call.out)
        return same and self._contractions(call) > 0

    def _eligible(self, call: Call) -> bool:
        if not self._like_its_input(call):
            return False
        x = call.inputs[0][1]
        return self._closed(call, x) and not self._residual(call, x) and not self._second_stream(call, x)

    def _span(self, call: Call) -> tuple[int, int]:
        """First and last index of a call's nodes."""
        assert call.last is not None
        start = 0 if call.before is None else self.at[call.before] + 1
        return start, self.at[call.last]

    def _contractions(self, call: Call) -> int:
        start, end = self._span(call)
        return sum(map(is_layer, self.nodes[start : end + 1]))

    def _shut(self, call: Call) -> bool:
        """One way out: nothing that is made inside is read outside, but the result."""
        start, end = self._span(call)
        inside = (n for n in self.nodes[start : end + 1] if n.op == "call_function" and n is not call.out)
        return not any(self.at[user] > end for node in inside for user in node.users)

    def _closed(self, call: Call, x: fx.Node) -> bool:
        """One way out, and one way in: nobody else nearby reads the stream."""
        if not self._shut(call):
            return False
        start, end = self._span(call)
        low, high = self._span(call.parent) if call.parent is not None else (0, len(self.nodes))
        return not any(low <= self.at[u] <= high and not start <= self.at[u] <= end for u in x.users)

    def _residual(self, call: Call, x: fx.Node) -> bool:
        """The result is merged with the stream itself, which went around: a branch, whose neutral element is zero."""
        if call.parent is None or call.out is None or call.parent.last is None:
            return False
        end = self._span(call)[1]
        high = self._span(call.parent)[1]
        before = self._before(x)
        reached = {call.out}
        for node in self.nodes[end + 1 : high + 1]:
            read = [a for a in node.all_input_nodes if a in reached]
            if not read:
                continue
            reached.add(node)
            operator = operator_of(node)
            if operator is not None and (operator.sums or operator.merge is Merge.PRODUCT):
                others = (a for a in node.all_input_nodes if a not in reached)
                if any(a in before and shape_of(a) == shape_of(x) for a in others):
                    return True
        return False

    def _before(self, x: fx.Node) -> set[fx.Node]:
        """`x` and all it was computed from."""
        found, stack = {x}, [x]
        while stack:
            for node in stack.pop().all_input_nodes:
                if node not in found and node.op != "get_attr":
                    found.add(node)
                    stack.append(node)
        return found

    def _second_stream(self, call: Call, x: fx.Node) -> bool:
        """Another argument is what the parent was called with: the block adds it itself."""
        stream = None if call.parent is None else call.parent.first
        return stream is not x and any(node is stream for _, node in call.inputs[1:])


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of what a recorded node made, None where that is no tensor."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(shape)


def overlap(a: str, b: str) -> bool:
    """One path is the other or lies in it."""
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


def find_blocks(model: nn.Module, example_input: Any) -> tuple[Block, ...]:
    """The layers of `model` that can be left out, in the order in which they run.

    From one recorded run: modules that are called once, compute something with weights, read one stream and return a
    tensor of its shape (or a tuple that begins with one), where nobody else nearby reads that stream and nothing else
    that they compute is read outside. Branches of a residual connection are none - the block around them is - and of
    nested ones the repeated elements of a Sequential or a ModuleList are taken.
    """
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    watch = Watch(model)
    trace = record_run(model, ExampleInput.of(example_input), observe=watch.observing)
    return tuple(Search(trace.graph, watch.calls, watch.modules).blocks())
