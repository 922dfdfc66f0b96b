"""Run the recorded graph on cut tensors: every call as it was recorded, with its sizes rewritten from the coordinates.

This is a second, independent way to carry out a plan. It never looks at the user's code, so it agrees with the pruned
module only if both are right.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...dependency import DependencyGraph
from ...dependency.reparametrised import forms_in
from ...dependency.sizes import gone_on_axis, gone_with
from ...dependency.state import Mask
from ...errors import GraphPruneError
from ...support.cutting import cut_tensor
from ...support.walking import named_tensors
from ...tracing.example import ExampleInput
from ...tracing.names import operator_name
from ..modules.recurrent import run_layers
from ..plan import Plan
from .precision import Computing
from .results import out_of_memory


def gone_components(graph: DependencyGraph, plan: Plan) -> Mask:
    """Which components a plan, in the names of the graph, removes: those with every index on some parameter axis."""
    return gone_with(graph.analysis, plan.removed)


class OtherLengths(GraphPruneError):
    """A recorded call does not fit, because lengths follow from values and are not those of the recorded run."""


class RewrittenRun:
    """Executes the recorded calls in order; one method per kind of call whose arguments hold sizes."""

    def __init__(self, graph: DependencyGraph, gone: Mask, tensors: dict[str, Tensor]) -> None:
        self.graph = graph
        self.gone = gone
        self.tensors = tensors
        self.env: dict[fx.Node, Any] = {}
        # node -> what nobody reads after it; kept until the end, all activations would be in memory at once
        self.finished: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(list(graph.trace.graph.nodes)):
            last = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
            seen.update(last)
            self.finished[node] = last
        self.device = next(iter(tensors.values())).device if tensors else torch.device("cpu")

    def run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        for node in self.graph.trace.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = inputs[int(node.name.rpartition("_")[2])]
            elif node.op == "get_attr":
                self.env[node] = self.tensors[node.target]
            elif node.op == "output":
                return tuple(self.env[n] for n in node.args[0][: self.graph.trace.outputs])
            elif node.target is operator.getitem:
                self.env[node] = self.env[node.args[0]][node.args[1]]
            else:
                self.env[node] = self._explained(node)
            for done in self.finished[node]:
                del self.env[done]
        raise AssertionError("a recorded graph ends in an output node")

    def _explained(self, node: fx.Node) -> Any:
        try:
            return self._call(node)
        except (GraphPruneError, RuntimeError, ValueError, TypeError, IndexError) as error:
            if out_of_memory(error):
                raise
            tensors = [n for n in node.all_input_nodes if isinstance(self.env[n], Tensor)]
            others = any(list(self.env[n].shape) != self._shape(n) for n in tensors)
            source = node.meta.get("source")
            raise (OtherLengths if others else GraphPruneError)(
                f"verify: the recorded call of {node.meta.get('function') or operator_name(node)}"
                f"{f' at {source}' if source else ''} cannot be evaluated with what the plan leaves "
                f"({type(error).__name__}: {error}); pass verify=False and look at the outputs yourself"
            ) from error

    def _call(self, node: fx.Node) -> Any:
        args = list(fx.node.map_arg(node.args, self.env.__getitem__))
        kwargs = dict(fx.node.map_arg(node.kwargs, self.env.__getitem__))
        name = operator_name(node)
        if kwargs.get("device") is not None:  # recorded on the meta device
            kwargs["device"] = self.device
        method: Callable[..., Any] | None = getattr(self, f"_{name.strip('_')}", None)
        if method is not None:
            return method(node, args, kwargs)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if name.startswith("c10d::"):  # between processes: it returns before it is done, with what to wait for
            for work in result if isinstance(result, (tuple, list)) else ():
                if isinstance(work, torch.ScriptObject):
                    torch.distributed.Work.unbox(work).wait()
        return result

    # -- sizes after pruning

    def _kept(self, node: Any, axis: int) -> np.ndarray:
        """Which indices of an axis of a recorded tensor stay."""
        state = self.graph.analysis.state(node)
        axis %= len(state.shape)
        return ~gone_on_axis(self.graph.analysis, state.axis(axis), state.shape[axis], self.gone)

    def _shape(self, node: fx.Node) -> list[int]:
        shape = node.meta["val"].shape
        return [int(self._kept(node, a).sum()) for a in range(len(shape))]

    # -- calls

    def _view(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        shape = self._shape(node)
        try:
            out: Tensor = args[0].view(shape)
        except RuntimeError:
            out = args[0].reshape(shape)
        return out

    _unsafe_view = _view
    _reshape = _reshape_alias = _view

    def _expand(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return args[0].expand(self._shape(node))

    def _repeat(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        shape = self._shape(node)
        before = [1] * (len(shape) - args[0].dim()) + list(args[0].shape)
        times = list(args[1])
        for axis, (new, old) in enumerate(zip(shape, before, strict=True)):
            if old == 1:  # others are as long as they are, as often as before
                times[axis] = new
        return args[0].repeat(times)

    def _slice(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        kept = self._kept(node.args[0], dim)
        if kept.all():
            return node.target(*args, **kwargs)  # type: ignore[operator]
        bounds = slice(args[2] if len(args) > 2 else None, args[3] if len(args) > 3 else None).indices(len(kept))
        start, stop = int(kept[: bounds[0]].sum()), int(kept[: bounds[1]].sum())
        return torch.ops.aten.slice.Tensor(args[0], dim, start, stop, args[4] if len(args) > 4 else 1)

    def _select(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kept = self._kept(node.args[0], args[1])
        return args[0].select(args[1], int(kept[: args[2] % len(kept)].sum()))

    def _split(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        kept = self._kept(node.args[0], dim)
        sizes = [m.shape[dim % len(m.shape)] for m in node.meta["val"]]
        bounds = np.cumsum([0, *sizes])
        new = [int(kept[a:b].sum()) for a, b in itertools.pairwise(bounds)]
        return torch.split(args[0], new, dim)

    _split_with_sizes = _unsafe_split = _unsafe_split_with_sizes = _split

    def _roll(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        shifts, dims = args[1], args[2] if len(args) > 2 else ()
        shifts = [shifts] if isinstance(shifts, int) else list(shifts)
        dims = [dims] if isinstance(dims, int) else list(dims)
        new = []
        for shift, dim in zip(shifts, dims, strict=True):
            kept = self._kept(node.args[0], dim)
            new.append(int(kept[len(kept) - shift % len(kept) :].sum()) if shift % len(kept) else 0)
        return torch.roll(args[0], new, dims)

    def _convolution(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        x, weight = args[0], args[1]
        if args[8] > 1:
            channels = self._shape(node)[1] if args[6] else x.shape[1]
            args[8] = channels // weight.shape[1]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _native_group_norm(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if args[6] == args[4]:
            args[6] = x.shape[1]
        args[3], args[4], args[5] = x.shape[0], x.shape[1], x[0, 0].numel()
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _native_layer_norm(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        args[1] = list(args[0].shape[-len(args[1]) :])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    _layer_norm = _fused_rms_norm = _rms_norm = _native_layer_norm

    def _scaled_dot_product_attention(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("scale") is None:
            kwargs["scale"] = node.args[0].meta["val"].shape[-1] ** -0.5  # type: ignore[union-attr]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    _scaled_dot_product_flash_attention_for_cpu = _scaled_dot_product_attention

    def _zeros(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        args[0] = self._shape(node)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    _ones = _empty = _full = _rand = _randn = _zeros

    def _new_zeros(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        args[1] = self._shape(node)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    _new_ones = _new_empty = _new_full = _new_zeros

    def _native_channel_shuffle(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        before = node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
        parts = self._kept(node.args[0], 1).reshape(args[1], before // args[1])
        return node.target(args[0], int(parts.any(1).sum()))  # type: ignore[operator]

    _channel_shuffle = _native_channel_shuffle

    def _recurrent(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Layer by layer, as widths may differ where the initial states are zeros."""
        name = operator_name(node)
        packed = int("data" in node.target._overloadname)  # type: ignore[union-attr]
        data, states, weights, biases, layers = args[0], *args[1 + packed : 5 + packed]
        step = len(weights) // layers
        made = node.args[1 + packed] if name == "lstm" else [node.args[1 + packed]]
        starts: list[Any] = [None] * layers
        if not all(operator_name(n) == "zeros" for n in made):  # type: ignore[union-attr, arg-type]
            kinds = [s.to(data.dtype).chunk(layers) for s in (states if name == "lstm" else [states])]
            starts = list(zip(*kinds, strict=True))
        out, ends = run_layers(
            name.upper(),
            data,
            args[1] if packed else None,
            starts,
            [weights[i : i + step] for i in range(0, len(weights), step)],
            biases=biases,
            directions=2 if args[7 + packed] else 1,
            batch_first=not packed and bool(args[8]),
        )
        used = [torch.cat(e) if len({t.shape for t in e}) == 1 else None for e in zip(*ends, strict=True)]
        return (out, *used)

    _lstm = _gru = _rnn_tanh = _rnn_relu = _recurrent

    def _as_strided(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        x, meta = args[0], node.args[0].meta["val"]  # type: ignore[union-attr]
        if operator_name(node) == "as_strided_" and meta.shape == node.meta["val"].shape:
            return x  # after a pool: only the memory layout changes
        layout = node.meta.get("layout")
        if layout is None or tuple(x.shape) != meta.shape:  # its rule holds the tensor that it looks at
            raise GraphPruneError("it looks at places in memory, which are known for the recorded sizes alone")
        if layout == (x.stride(), x.storage_offset()):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return _looked_up(x, layout, *_window(args, kwargs, layout[1]))


def _window(args: list[Any], kwargs: dict[str, Any], start: int) -> tuple[list[int], list[int], int]:
    """The size, strides and offset that as_strided was given; without an offset it is that of the tensor, `start`."""
    given = dict(zip(("size", "stride", "storage_offset"), args[1:], strict=False)) | kwargs
    offset = given.get("storage_offset")
    return list(given["size"]), list(given["stride"]), start if offset is None else offset


def _offsets(size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
    """The place in memory of each element."""
    out = torch.full(tuple(size), start, dtype=torch.int64)
    for axis, step in enumerate(stride):
        view = [1] * len(size)
        view[axis] = -1
        out += (torch.arange(size[axis]) * step).reshape(view)
    return out


def _looked_up(
    x: Tensor, layout: tuple[tuple[int, ...], int], size: list[int], stride: list[int], start: int
) -> Tensor:
    """What as_strided makes of a tensor that lay in memory like `layout` (strides, offset) and does so no more."""
    held, wanted = _offsets(x.shape, *layout), _offsets(size, stride, start)
    if not wanted.numel():
        return x.new_empty(size)
    index = torch.full((int(max(held.max() if held.numel() else 0, wanted.max())) + 1,), -1)
    index[held.reshape(-1)] = torch.arange(held.numel())
    found = index[wanted]
    if bool((found < 0).any()):
        raise GraphPruneError("it looks at places in memory that do not belong to the tensor")
    return x.reshape(-1)[found.to(x.device)]


def run_rewritten(
    graph: DependencyGraph, plan: Plan, example: ExampleInput, original: nn.Module, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The outputs of the recorded graph when the plan's slices are cut from the original's tensors; `dtype`: all
    computed in this precision."""
    named = named_tensors(original)
    tensors, forms = {}, forms_in(original)
    for name in graph.trace.parameters:
        tensor = named[name].detach()
        # a run may write into buffers: never into the user's
        tensors[name] = cut_tensor(tensor, plan.removed[name]) if name in plan.removed else tensor.clone()
        if name in forms and name in plan.removed:
            tensors[name] = forms[name].settled(tensors[name])
    for name, tensor in graph.trace.constants.items():
        converted = dtype is not None and tensor.is_floating_point()
        tensors[name] = tensor.to(dtype) if converted else tensor.clone()
    gone = gone_components(graph, plan)
    with torch.no_grad(), contextlib.nullcontext() if dtype is None else Computing(dtype):
        return RewrittenRun(graph, gone, tensors).run(example.clone().tensors())
