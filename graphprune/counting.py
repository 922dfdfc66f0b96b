"""Parameters and multiply-accumulates, counted on the recorded run: what the model really computed, call by call."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from torch import fx, nn
from torch.nn.parameter import is_lazy

from .errors import GraphPruneError
from .report.tables import Column, render, table
from .tracing.example import ExampleInput
from .tracing.recorder import TensorMeta
from .tracing.trace import record_run


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """One module, without the modules inside it.

    `kind`: the name of its class. `parameters`: elements of the parameters it holds itself; a shared parameter counts
    where it is first found. `macs`: of the operators called while it was the innermost running module, over all calls.
    """

    kind: str
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Count:
    """What `count` found.

    `parameters`: elements of all parameters, each counted once however often it is used; buffers are not parameters.
    `macs`: multiply-accumulates of one forward pass over the whole example, not per sample. `batch_size`: length of
    the first axis of the example's first tensor, None without one. `per_layer`: module path ("" is the model itself)
    -> LayerCount, for every module that holds parameters or does arithmetic; the entries add up to the totals.
    `uncounted`: operators of the run that do such arithmetic in a way that is not counted -> number of calls.
    """

    parameters: int
    macs: int
    batch_size: int | None
    per_layer: Mapping[str, LayerCount]
    uncounted: Mapping[str, int]

    @property
    def macs_per_sample(self) -> float | None:
        """`macs / batch_size`: right where the first axis of the first input is the batch."""
        return self.macs / self.batch_size if self.batch_size else None

    def table(self) -> Table:
        """One line per layer and the totals, as a `rich` table."""
        rows: list[tuple[str, str, int, int]] = [
            (path or "(the model itself)", layer.kind, layer.parameters, layer.macs)
            for path, layer in self.per_layer.items()
        ]
        rows.append(("total", "", self.parameters, self.macs))
        columns = [
            Column("layer", 0, justify="left"),
            Column("kind", 1, justify="left"),
            Column("parameters", 2, ","),
            Column("MACs", 3, ","),
        ]
        result = table(rows, columns)
        if self.per_layer:
            result.rows[-2].end_section = True
        return result

    def __str__(self) -> str:
        lines = []
        if self.batch_size is not None:
            lines.append(f"MACs of one forward pass at batch size {self.batch_size}")
        if self.uncounted:
            lines.append("not counted: " + ", ".join(f"{name} ({calls})" for name, calls in self.uncounted.items()))
        return render(self.table(), *lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and numbers, ready for JSON."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "batch_size": self.batch_size,
            "macs_per_sample": self.macs_per_sample,
            "per_layer": {path: dataclasses.asdict(layer) for path, layer in self.per_layer.items()},
            "uncounted": dict(self.uncounted),
        }


def count(model: nn.Module, example_input: Any) -> Count:
    """Parameters and multiply-accumulates (MACs) of `model`, in all and per layer.

    The model runs once on the example (eval mode, no gradients, left as it was) and what it computed is counted, at
    the example's batch size: layers, functional calls, matrix products with broadcasting, both products of attention,
    einsum, bilinear forms, recurrent layers. A layer that is called twice counts twice, one that is not called counts
    nothing. FLOPs are about twice the MACs.

    Counted are sums of products: convolutions count every kernel position, the padded ones too, and attention the
    whole score matrix, a causal or masked one too. Elementwise arithmetic, biases, norms, activations, pooling and
    interpolation count zero, as is usual. Operators that are known to do more (Fourier transforms, sparse products,
    solvers, other libraries' kernels) are listed in `uncounted`.

    `example_input`: a tensor, a tuple of positional arguments or a dict of keyword arguments. Works on any device;
    on "meta" nothing is computed.

    >>> import torch, graphprune
    >>> found = graphprune.count(torch.nn.Linear(3, 4), torch.randn(2, 3))
    >>> found.parameters, found.macs, found.macs_per_sample
    (16, 24, 12.0)

    Raises GraphPruneError when the model fails on the example input, or has parameters without a shape (lazy modules
    that never ran).
    """
    example = ExampleInput.of(example_input)
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if is_lazy(parameter):
                raise GraphPruneError(f"{name} has no shape yet; run the model once before counting it")
    trace = record_run(model, example)
    macs: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for node in trace.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        work = macs_of(node)
        namespace, _, name = _operator_name(node).partition("::")
        if work is not None:
            path = node.meta.get("module") or ""
            macs[path] = macs.get(path, 0) + work
        elif _unknown_work(namespace, name):
            uncounted[f"{namespace}::{name}"] = uncounted.get(f"{namespace}::{name}", 0) + 1
    layers: dict[str, LayerCount] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                held += parameter.numel()
        if held or macs.get(path):
            layers[path] = LayerCount(type(module).__name__, held, macs.get(path, 0))
    batch = next((t.shape[0] for t in example.tensors() if t.dim()), None)
    return Count(
        parameters=sum(layer.parameters for layer in layers.values()),
        macs=sum(macs.values()),
        batch_size=batch,
        per_layer=layers,
        uncounted=uncounted,
    )


def macs_of(node: fx.Node) -> int | None:
    """Multiply-accumulates of one recorded call; None for what does no such arithmetic, or in a way not counted."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    namespace, _, name = _operator_name(node).partition("::")
    rule = _RULES.get(name) if namespace in ("aten", "torchvision") else None
    return None if rule is None else rule(_Call(node))


def _operator_name(node: fx.Node) -> str:
    """Namespace and name, such as "aten::convolution"."""
    name = getattr(node.target, "name", None)
    return str(name()).partition(".")[0] if callable(name) else f"other::{node.target}"


# Operators of ATen that multiply and add, in amounts that depend on more than shapes or on the implementation.
_WORKING = re.compile(
    "conv|mm$|matmul|linear$|fft|linalg_|sparse|cdist|flash_attention|efficient_attention|multi_head_attention|_rnn"
)
# Share a word with those above, but do no more than elementwise arithmetic.
_IDLE = re.compile(
    "convert|to_sparse|sparse_coo_tensor|sparse_compressed|fftfreq|fftshift|linalg_(check|cross|diagonal|vector_norm)"
)
_IDLE_NAMESPACES = frozenset("prim prims profiler c10d _c10d_functional".split())
_IDLE_KERNELS = frozenset(
    "nms roi_align roi_pool ps_roi_align ps_roi_pool _cuda_version _jpeg_version decode_image".split()
)


def _unknown_work(namespace: str, name: str) -> bool:
    if namespace in _IDLE_NAMESPACES:
        return False
    if namespace == "torchvision":
        return name not in _IDLE_KERNELS
    if namespace != "aten":
        return True  # another library's kernel
    return bool(_WORKING.search(name)) and not _IDLE.search(name)


class _Call:
    """The shapes and numbers that one recorded call was given."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self._names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of that name in the operator's schema, however it was passed."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        if name == "self" and "input" in self.node.kwargs:  # what Python calls it
            return self.node.kwargs["input"]
        position = self._names.index(name) if name in self._names else len(self._names)
        return self.node.args[position] if position < len(self.node.args) else default

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument, () for anything else."""
        return _shape(self.argument(name))

    @property
    def first(self) -> str:
        """The name of the first argument."""
        return str(self._names[0])

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        meta = self.node.meta["val"]
        found: tuple[int, ...] = (meta[0] if isinstance(meta, tuple) else meta).shape
        return found


def _shape(value: Any) -> tuple[int, ...]:
    meta = value.meta.get("val") if isinstance(value, fx.Node) else None
    return meta.shape if isinstance(meta, TensorMeta) else ()


def _product(left: str, axis: int = -1) -> Callable[[_Call], int]:
    """Every element of the result is a sum as long as `axis` of the operand `left`."""

    def rule(call: _Call) -> int:
        return math.prod(call.result) * call.shape(left)[axis]

    return rule


def _addbmm(call: _Call) -> int:
    batch, rows, inner = call.shape("batch1")
    return batch * rows * inner * call.shape("batch2")[2]


def _grouped_mm(call: _Call) -> int:
    # (g, m, k) x (g, k, n); with a 2-d operand one of its axes is shared out among the groups
    a, b = call.shape("self"), call.shape("mat2")
    return (a[0] if len(a) == len(b) == 3 else 1) * a[-2] * a[-1] * b[-1]


def _convolution(call: _Call) -> int:
    # weight (out, in / groups, kernel), transposed: (in, out / groups, kernel)
    weight = call.shape("weight")
    sites = call.shape(call.first) if call.argument("transposed", False) else call.result
    return sites[0] * math.prod(sites[2:]) * math.prod(weight)


def _conv_tbc(call: _Call) -> int:
    kernel, inner, _ = call.shape("weight")
    return math.prod(call.result) * kernel * inner


def _attention(call: _Call) -> int:
    # query (..., L, E), key (..., S, E), value (..., S, V): scores are L x S sums over E, results L x V sums over S
    query, key, value = call.shape("query"), call.shape("key"), call.shape("value")
    result = call.result
    return math.prod(result[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(call: _Call) -> int:
    # Every matrix of weights is multiplied with one vector per step and sequence; the gates' products are elementwise.
    data = call.shape("data" if "data" in call._names else "input")
    steps = math.prod(data[:-1])
    return steps * sum(math.prod(_shape(w)) for w in call.argument("params") if len(_shape(w)) == 2)


def _trilinear(call: _Call) -> int:
    """sum(i1 * i2 * i3) over `sumdim`, where each operand lacks the axes in its expand list: as torch does it, first
    i1 with i2, summed over what i3 lacks, then with i3."""
    operands = [call.shape(name) for name in ("i1", "i2", "i3")]
    lacking = [[int(d) for d in call.argument(f"expand{i}")] for i in (1, 2, 3)]
    rank = len(operands[0]) + len(lacking[0])
    joint = [1] * rank
    for shape, missing in zip(operands, lacking, strict=True):
        for axis, length in zip([a for a in range(rank) if a not in missing], shape, strict=True):
            joint[axis] = max(joint[axis], length)
    first = [a for a in range(rank) if a not in lacking[0] or a not in lacking[1]]
    gone = {int(d) for d in call.argument("sumdim") if int(d) in lacking[2]}
    second = [a for a in range(rank) if a not in gone]
    return math.prod(joint[a] for a in first) + math.prod(joint[a] for a in second)


def _deform_conv(call: _Call) -> int:
    return math.prod(call.result) * math.prod(call.shape("weight")[1:])


_CONVOLUTIONS = "convolution _convolution mkldnn_convolution _slow_conv2d_forward".split()
_ATTENTIONS = (
    "scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
).split()
_RULES: dict[str, Callable[[_Call], int]] = {
    "mm": _product("self"),
    "bmm": _product("self"),
    "matmul": _product("self"),
    "mv": _product("self"),
    "dot": _product("self"),
    "vdot": _product("self"),
    "_int_mm": _product("self"),
    "_scaled_mm": _product("self"),
    "linear": _product("input"),
    "addmm": _product("mat1"),
    "_addmm_activation": _product("mat1"),
    "addmv": _product("mat"),
    "baddbmm": _product("batch1"),
    "addbmm": _addbmm,
    "_grouped_mm": _grouped_mm,
    "_scaled_grouped_mm": _grouped_mm,
    "_trilinear": _trilinear,
    "conv_tbc": _conv_tbc,
    "deform_conv2d": _deform_conv,
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], _recurrent),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_ATTENTIONS, _attention),
}

__all__ = ["Count", "LayerCount", "count", "macs_of"]
