"""What one recorded call computes: multiply-accumulates by operator."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

from torch import fx

from .recorder import TensorMeta


def macs_of(node: fx.Node) -> int | None:
    """Multiply-accumulates of one recorded call; None for what does no such arithmetic, or in a way not counted."""
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    namespace, _, name = qualified_name(node).partition("::")
    rule = _RULES.get(name) if namespace in ("aten", "torchvision") else None
    return None if rule is None else rule(_Call(node))


def qualified_name(node: fx.Node) -> str:
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


def not_counted(node: fx.Node) -> bool:
    """Is this a call that multiplies and adds in a way that `macs_of` does not know?"""
    namespace, _, name = qualified_name(node).partition("::")
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
