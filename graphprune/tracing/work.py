"""What one recorded call computes: its multiply-accumulates, as sums of products of the lengths of tensors' axes.

What it is by operator, says the table (`graphprune/tracing/operators/`). Counts multiply the lengths as they were
recorded, budgets those that axes have once groups are narrower, and `doctor` asks which of the axes can become shorter.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Mapping

from torch import fx

from .operators import Kind, Operator, operator_of
from .operators.work import Call, Loop, Term, work_of_product


def terms_of(node: fx.Node) -> tuple[Term, ...] | None:
    """The work of one recorded call, a sum of terms; None for what does no such arithmetic, or in a way not counted."""
    found = operator_of(node)
    return None if found is None else _terms(node, found)


def _terms(node: fx.Node, found: Operator) -> tuple[Term, ...] | None:
    if found.work is not None:
        return found.work(Call(node))
    if found.form is None or found.kind is Kind.LOOKUP:
        return None
    return tuple(work_of_product(node, product) for product in found.form.products(node)) or None


def work_by_call(lines: Mapping[fx.Node, Operator]) -> dict[fx.Node, tuple[Term, ...]]:
    """`terms_of` every call of the run in eval mode that multiplies and adds."""
    return {node: terms for node, line in lines.items() if runs_in_eval(node) and (terms := _terms(node, line))}


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


__all__ = [
    "Loop",
    "Term",
    "macs_of",
    "not_counted",
    "qualified_name",
    "runs_in_eval",
    "term_macs",
    "terms_of",
    "work_by_call",
]
