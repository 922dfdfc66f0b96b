"""What one recorded call computes: its multiply-accumulates, as sums of products of the lengths of tensors' axes.

This is the one place that knows it. Counts multiply the lengths as they were recorded, budgets those that axes have
once groups are narrower, and `doctor` asks which of the axes can become shorter.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from .names import operator_name
from .recorder import TensorMeta

Place = tuple[fx.Node, int]


class Loop(NamedTuple):
    """`length` steps along an axis. `places`: the tensors that the axis is one of, (recorded tensor, axis from 0)
    each; of a call with several results the first one is meant. Of an axis that is removed in one, the others lose as
    much."""

    length: int
    places: tuple[Place, ...]


Term = tuple[Loop, ...]
"""Loops inside one another, with one multiplication and addition inside all of them."""


def terms_of(node: fx.Node) -> tuple[Term, ...] | None:
    """The work of one recorded call, a sum of terms; None for what does no such arithmetic, or in a way not counted."""
    rule = TERMS.get(operator_name(node)) if node.op == "call_function" else None
    return None if rule is None else rule(Call(node))


def term_macs(term: Term) -> int:
    """Multiply-accumulates of one term, as recorded."""
    return math.prod(loop.length for loop in term)


def macs_of(node: fx.Node) -> int | None:
    """Multiply-accumulates of one recorded call; None for what does no such arithmetic, or in a way not counted."""
    terms = terms_of(node)
    return None if terms is None else sum(map(term_macs, terms))


def runs_in_eval(node: fx.Node) -> bool:
    """Whether a call belongs to the run in eval mode, and not to what only training does besides."""
    return node.op == "call_function" and "training_only" not in node.meta


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
    """Is this a call that multiplies and adds in a way that `terms_of` does not know?"""
    if node.target is operator.getitem:
        return False
    return _multiplies(qualified_name(node))


@functools.lru_cache(4096)
def _multiplies(qualified: str) -> bool:
    namespace, _, name = qualified.partition("::")
    if namespace in _IDLE_NAMESPACES:
        return False
    if namespace == "torchvision":
        return name not in _IDLE_KERNELS
    if namespace != "aten":
        return True  # another library's kernel
    return bool(_WORKING.search(name)) and not _IDLE.search(name)


@functools.lru_cache(4096)
def _positions(target: Any) -> dict[str, int]:
    """Where an operator takes its arguments."""
    return {argument.name: i for i, argument in enumerate(target._schema.arguments)}


class Call:
    """The tensors and numbers that one recorded call was given."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self._positions = _positions(node.target)

    def has(self, name: str) -> bool:
        """Whether the operator takes an argument of that name."""
        return name in self._positions

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of that name in the operator's schema, however it was passed."""
        node = self.node
        if name in node.kwargs:
            return node.kwargs[name]
        if name == "self" and "input" in node.kwargs:  # what Python calls it
            return node.kwargs["input"]
        position = self._positions.get(name, len(node.args))
        return node.args[position] if position < len(node.args) else default

    @property
    def names(self) -> list[str]:
        """The names of its arguments, in order."""
        return list(self._positions)


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a recorded tensor, of the first of several; () of anything else."""
    meta = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(meta, tuple):
        meta = meta[0] if meta else None
    return meta.shape if isinstance(meta, TensorMeta) else ()


def along(*places: tuple[Any, int]) -> Loop:
    """The loop along an axis of a tensor, and where else that axis is found; negative axes count from the end. A place
    where the axis has another length (it is broadcast there) is none."""
    length = shape_of(places[0][0])[places[0][1]]
    found = []
    for tensor, axis in places:
        shape = shape_of(tensor)
        if -len(shape) <= axis < len(shape) and shape[axis] == length:
            found.append((tensor, axis % len(shape)))
    return Loop(length, tuple(found))


def _every(node: Any, *without: int) -> Term:
    """Loops along the axes of a tensor, but for some."""
    shape = shape_of(node)
    return tuple(Loop(n, ((node, a),)) for a, n in enumerate(shape) if a not in without)


def _product(left: str) -> Callable[[Call], tuple[Term, ...]]:
    """Every element of the result is a sum over the last axis of the operand `left`, times the operand after it."""

    def rule(call: Call) -> tuple[Term, ...]:
        a = call.argument(left)
        names = call.names
        b = call.argument(names[names.index(left) + 1])
        inner = -1 if left == "input" or len(shape_of(b)) == 1 else -2  # the weight of linear is (out, in)
        return ((*_every(call.node), along((a, -1), (b, inner))),)

    return rule


def _addbmm(call: Call) -> tuple[Term, ...]:
    a, b = call.argument("batch1"), call.argument("batch2")
    batch, inner = along((a, 0), (b, 0)), along((a, 2), (b, 1))
    return ((batch, along((call.node, 0), (a, 1)), inner, along((call.node, 1), (b, 2))),)


def _grouped_mm(call: Call) -> tuple[Term, ...]:
    # (g, m, k) x (g, k, n); with a 2-d operand one of its axes is shared out among the groups
    a, b = call.argument("self"), call.argument("mat2")
    both = len(shape_of(a)) == len(shape_of(b)) == 3
    lead = (along((a, 0), (b, 0)),) if both else ()
    return ((*lead, along((a, -2), (call.node, -2)), along((a, -1), (b, -2)), along((b, -1), (call.node, -1))),)


def _convolution(call: Call) -> tuple[Term, ...]:
    # weight (out, in / groups, kernel), transposed: (in, out / groups, kernel)
    weight = call.argument("weight")
    sites = call.argument(call.names[0]) if call.argument("transposed", False) else call.node
    return ((*_every(sites, 1), *_every(weight)),)


def _conv_tbc(call: Call) -> tuple[Term, ...]:
    data, weight = call.argument("self"), call.argument("weight")  # (steps, batch, in), (kernel, in, out)
    inner, outer = along((weight, 1), (data, 2)), along((weight, 2), (call.node, 2))
    return ((*_every(call.node, 2), along((weight, 0)), inner, outer),)


def _deform_conv(call: Call) -> tuple[Term, ...]:
    return ((*_every(call.node, 1), *_every(call.argument("weight"))),)


def _attention(call: Call) -> tuple[Term, ...]:
    # query (..., L, E), key (..., S, E), value (..., S, V): scores are L x S sums over E, results L x V sums over S
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    rank = len(shape_of(call.node))
    scores = (*(along((call.node, a), (query, a)) for a in range(rank - 1)), along((key, -2), (value, -2)))
    return (*scores, along((query, -1), (key, -1))), (*scores, along((value, -1), (call.node, -1)))


def _recurrent(call: Call) -> tuple[Term, ...]:
    # Every matrix of weights is multiplied with one vector per step and sequence; the gates' products are elementwise.
    data = call.argument("data" if call.has("data") else "input")
    steps = _every(data, len(shape_of(data)) - 1)
    return tuple((*steps, *_every(w)) for w in call.argument("params") if len(shape_of(w)) == 2)


def _trilinear(call: Call) -> tuple[Term, ...]:
    """sum(i1 * i2 * i3) over `sumdim`, where each operand lacks the axes in its expand list: as torch does it, first
    i1 with i2, summed over what i3 lacks, then with i3."""
    operands = [call.argument(name) for name in ("i1", "i2", "i3")]
    rank = len(shape_of(operands[0])) + len(call.argument("expand1"))
    lacking = [{int(d) % rank for d in call.argument(f"expand{i}")} for i in (1, 2, 3)]
    summed = {int(d) % rank for d in call.argument("sumdim")}
    places: list[list[tuple[Any, int]]] = [[] for _ in range(rank)]
    for operand, missing in zip(operands, lacking, strict=True):
        for axis, joint in enumerate(a for a in range(rank) if a not in missing):
            places[joint].append((operand, axis))
    for found in places:  # the length is that of the operands which are not broadcast
        found.sort(key=lambda place: -shape_of(place[0])[place[1]])
    joint_loops = [along(*found) for found in places]
    first = tuple(joint_loops[a] for a in range(rank) if a not in lacking[0] or a not in lacking[1])
    second = tuple(joint_loops[a] for a in range(rank) if a not in summed or a not in lacking[2])
    return first, second


_CONVOLUTIONS = "convolution _convolution mkldnn_convolution _slow_conv2d_forward".split()
_ATTENTIONS = (
    "scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
).split()
TERMS: dict[str, Callable[[Call], tuple[Term, ...]]] = {
    **dict.fromkeys("mm bmm matmul mv dot vdot _int_mm _scaled_mm".split(), _product("self")),
    "linear": _product("input"),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation"), _product("mat1")),
    **dict.fromkeys(("addmv", "addmv_"), _product("mat")),
    **dict.fromkeys(("baddbmm", "baddbmm_"), _product("batch1")),
    **dict.fromkeys(("addbmm", "addbmm_"), _addbmm),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm"), _grouped_mm),
    "_trilinear": _trilinear,
    "conv_tbc": _conv_tbc,
    "deform_conv2d": _deform_conv,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_ATTENTIONS, _attention),
}
"""By operator, as `operator_name` has it: what the work of a call is, None of them for all others."""
