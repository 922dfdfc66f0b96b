"""The table of operators: what each ATen call does, said once.

Names have no `aten::` and no overload. An operator that is not here is unknown to everything that asks, or, where torch
tags it so, an elementwise one. How channels flow through the less usual ones is said in rules of their own
(`graphprune/dependency/rules/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ...errors import GraphPruneError
from ...support.registry import Registry
from ..names import BUILT_IN, target_name
from .kinds import Kind, Merge, Move, Operator
from .products import ByStep, Cells, Declared, Deformable, Form, Layer, Matrices, Product, Rows, Sliding, Trilinear
from .work import (
    work_of_addbmm,
    work_of_attention,
    work_of_conv_tbc,
    work_of_convolution,
    work_of_deform_conv,
    work_of_grouped_mm,
    work_of_linear,
    work_of_matrices,
    work_of_recurrent,
    work_of_trilinear,
)

OPERATORS: Registry[Operator] = Registry("operator")

_INF = math.inf
_ENTRIES: list[tuple[Operator, str]] = [
    # -- products
    (Operator(Kind.CONTRACTION, Layer(), work_of_linear), "linear"),
    (Operator(Kind.CONTRACTION, Matrices(), work_of_matrices("self")), "mm bmm matmul mv dot"),
    (Operator(Kind.CONTRACTION, Matrices(), work_of_grouped_mm), "_grouped_mm"),
    (Operator(Kind.CONTRACTION, Matrices(1, 0), work_of_matrices("mat1")), "addmm addmm_"),
    (Operator(Kind.CONTRACTION, Matrices(1, 0), work_of_matrices("batch1")), "baddbmm baddbmm_"),
    (Operator(Kind.CONTRACTION, Matrices(1, 0), work_of_matrices("mat")), "addmv addmv_"),
    (Operator(Kind.CONTRACTION, Trilinear(), work_of_trilinear), "_trilinear"),
    # of these no more is known than what they do, and their work
    (Operator(Kind.CONTRACTION, work=work_of_matrices("self")), "vdot _int_mm _scaled_mm"),
    (Operator(Kind.CONTRACTION, work=work_of_matrices("mat1")), "_addmm_activation"),
    (Operator(Kind.CONTRACTION, work=work_of_addbmm), "addbmm addbmm_"),
    (Operator(Kind.CONTRACTION, work=work_of_grouped_mm), "_scaled_grouped_mm"),
    (Operator(Kind.CONTRACTION), "inner linalg_vecdot bilinear"),
    (Operator(Kind.CONVOLUTION, Sliding(), work_of_convolution), "convolution _convolution"),
    (Operator(Kind.CONVOLUTION, Sliding(groups=6, transposed=False, output_padding=None)), "conv1d conv2d conv3d"),
    (Operator(Kind.CONVOLUTION, Sliding(dilation=7, groups=6, transposed=True, output_padding=5)),
     "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (Operator(Kind.CONVOLUTION, Sliding(stride=4, padding=3, groups=6, transposed=False, output_padding=None),
              work_of_convolution),
     "mkldnn_convolution"),
    (Operator(Kind.CONVOLUTION, ByStep(), work_of_conv_tbc), "conv_tbc"),
    (Operator(Kind.CONVOLUTION, Deformable(), work_of_deform_conv), "deform_conv2d"),
    (Operator(Kind.CONVOLUTION, work=work_of_convolution), "_slow_conv2d_forward"),
    (Operator(Kind.CONVOLUTION), "cudnn_convolution"),
    (Operator(Kind.RECURRENT, Cells(4), work_of_recurrent), "lstm"),
    (Operator(Kind.RECURRENT, Cells(3), work_of_recurrent), "gru"),
    (Operator(Kind.RECURRENT, Cells(1), work_of_recurrent), "rnn_tanh rnn_relu"),
    (Operator(Kind.ATTENTION, work=work_of_attention),
     "scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention "
     "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
     "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"),
    (Operator(Kind.LOOKUP, Rows()), "embedding embedding_bag _embedding_bag _embedding_bag_forward_only"),
    # -- movement
    (Operator(Kind.MOVEMENT, move=Move.STAYS, view=True), "alias detach detach_ lift_fresh requires_grad_"),
    (Operator(Kind.MOVEMENT, move=Move.STAYS),
     "clone contiguous lift_fresh_copy _to_copy to type_as dropout dropout_ feature_dropout alpha_dropout "
     "feature_alpha_dropout alias_copy detach_copy positive resolve_conj resolve_neg"),
    (Operator(Kind.MOVEMENT, move=Move.RESHAPES, view=True),
     "view _unsafe_view reshape _reshape_alias reshape_as view_as flatten unflatten unsqueeze unsqueeze_ squeeze "
     "squeeze_"),
    (Operator(Kind.MOVEMENT, move=Move.RESHAPES), "view_copy unsqueeze_copy squeeze_copy"),
    (Operator(Kind.MOVEMENT, move=Move.ARRANGES, view=True),
     "permute transpose transpose_ t t_ swapaxes swapdims movedim moveaxis numpy_T mT adjoint"),
    (Operator(Kind.MOVEMENT, move=Move.ARRANGES),
     "permute_copy transpose_copy flip fliplr flipud roll pixel_shuffle pixel_unshuffle channel_shuffle "
     "native_channel_shuffle"),
    (Operator(Kind.MOVEMENT, move=Move.PICKS, view=True),
     "slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind "
     "tensor_split"),
    (Operator(Kind.MOVEMENT, move=Move.PICKS),
     "slice_copy select_copy split_copy split_with_sizes_copy unbind_copy index_select"),
    (Operator(Kind.MOVEMENT, move=Move.REPEATS, view=True), "expand expand_as broadcast_to"),
    (Operator(Kind.MOVEMENT, move=Move.REPEATS), "expand_copy repeat tile repeat_interleave"),
    (Operator(Kind.MOVEMENT, move=Move.JOINS), "cat concat concatenate stack"),
    (Operator(Kind.MOVEMENT, move=Move.PADS),
     "constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
     "replication_pad3d _pad_circular"),
    (Operator(Kind.MOVEMENT, view=True), "as_strided diagonal unfold view_as_real view_as_complex real imag"),
    # -- single elements
    (Operator(Kind.POINTWISE, merge=Merge.SUM), "add add_"),
    (Operator(Kind.POINTWISE, merge=Merge.DIFFERENCE), "sub sub_"),
    (Operator(Kind.POINTWISE, merge=Merge.PRODUCT, zeros=True), "mul mul_"),
    (Operator(Kind.POINTWISE, merge=Merge.QUOTIENT, zeros=True), "div div_ true_divide"),
    (Operator(Kind.POINTWISE, zeros=True), "neg native_dropout"),
    (Operator(Kind.POINTWISE, bends=(0.0,), clips=(0.0, _INF)), "relu relu_"),
    (Operator(Kind.POINTWISE, bends=(0.0, 6.0), clips=(0.0, 6.0)), "relu6 relu6_"),
    (Operator(Kind.POINTWISE, clips=(-1.0, 1.0)), "hardtanh hardtanh_"),
    (Operator(Kind.POINTWISE, clips=(math.nan, math.nan)), "clamp clamp_"),  # both have to be given
    (Operator(Kind.POINTWISE, bends=(0.0,)), "leaky_relu leaky_relu_ elu elu_ celu celu_ selu selu_ abs abs_"),
    (Operator(Kind.POINTWISE, bends=(-3.0, 3.0)), "hardsigmoid hardsigmoid_ hardswish hardswish_"),
    # torch tags the others
    (Operator(Kind.POINTWISE),
     "copy_ copy where masked_fill masked_fill_ lerp lerp_ addcmul addcdiv _prelu_kernel gelu gelu_ silu silu_ mish "
     "mish_ sigmoid_ tanh_ log_sigmoid_forward softplus softshrink hardshrink threshold threshold_ rsub clamp_min "
     "clamp_min_ clamp_max clamp_max_ rrelu_with_noise square square_ nan_to_num fake_quantize_per_tensor_affine "
     "float_power heaviside complex polar view_as_real_copy special_erf logit sinc"),
    # -- norms and other statistics
    (Operator(Kind.BATCH_NORM, own_statistics=5),
     "native_batch_norm batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm "
     "_batch_norm_impl_index instance_norm"),
    (Operator(Kind.BATCH_NORM, own_statistics=True), "_batch_norm_with_update"),
    (Operator(Kind.BATCH_NORM), "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    (Operator(Kind.LAYER_NORM), "native_layer_norm layer_norm"),
    (Operator(Kind.RMS_NORM), "_fused_rms_norm rms_norm"),
    (Operator(Kind.GROUP_NORM), "native_group_norm group_norm"),
    (Operator(Kind.WEIGHT_NORM), "_weight_norm_interface _weight_norm"),
    (Operator(Kind.SOFTMAX), "_softmax softmax _log_softmax log_softmax _safe_softmax"),
    (Operator(Kind.REDUCTION, averages=True), "mean"),
    (Operator(Kind.REDUCTION),
     "sum prod amax amin var std var_mean std_mean all any logsumexp nansum nanmean count_nonzero"),
    (Operator(Kind.POOLING, averages=True),
     "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
     "_adaptive_avg_pool2d _adaptive_avg_pool3d"),
    (Operator(Kind.POOLING),
     "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
     "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d "
     "quantized_max_pool2d fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d"),
    (Operator(Kind.RESAMPLING, move=Move.REPEATS), "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    (Operator(Kind.RESAMPLING),
     "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
     "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    # -- other
    (Operator(Kind.QUANTISATION, numbers=2),
     "quantize_per_channel fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask"),
    (Operator(Kind.QUANTISATION, numbers=6), "_fused_moving_avg_obs_fq_helper"),
    (Operator(Kind.READING), "_local_scalar_dense item is_nonzero"),
]  # fmt: skip

for _operator, _names in _ENTRIES:
    for _name in _names.split():
        OPERATORS.add(_name, _operator)

_ELEMENTWISE = Operator(Kind.POINTWISE)
# By the name of a user's operator. It may be one of torch's, of which the table says less.
_DECLARED: dict[str, Operator] = {}


def operator_of(node: fx.Node) -> Operator | None:
    """What the table says of a recorded call; None for an operator that is unknown, and for nodes that call nothing."""
    return operator_of_target(node.target) if node.op == "call_function" else None


def operator_of_target(target: Any) -> Operator | None:
    """`operator_of` what a node calls."""
    known = _known.get(id(target))
    if known is None:
        found = named(target_name(target)) or (_ELEMENTWISE if _is_elementwise(target) else None)
        known = _known.setdefault(id(target), (target, found))
    return known[1]


# What was found already, by identity: torch's operators take long to hash. Each is kept, so that no other gets its id.
_known: dict[int, tuple[Any, Operator | None]] = {}


def _is_elementwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


def named(name: str) -> Operator | None:
    """What the table says of an operator by its name."""
    return _DECLARED.get(name) or OPERATORS.get(name)


def kind_of(node: fx.Node) -> Kind | None:
    """The kind of a recorded call."""
    found = operator_of(node)
    return None if found is None else found.kind


def form_of(node: fx.Node) -> Form | None:
    """How the arguments of a recorded call make products."""
    found = operator_of(node)
    return None if found is None else found.form


def products_of(node: fx.Node) -> tuple[Product, ...]:
    """The one answer to what a call multiplies with what, built-in or a user's: see `Product`."""
    form = form_of(node)
    return () if form is None else form.products(node)


def lines_by_call(nodes: Iterable[fx.Node]) -> dict[fx.Node, Operator]:
    """`operator_of` every call of one that is known, in the order of the nodes."""
    return {node: found for node in nodes if (found := operator_of(node)) is not None}


def calls_by_kind(lines: Mapping[fx.Node, Operator]) -> dict[Kind, tuple[fx.Node, ...]]:
    """The calls of each kind, in the order of the nodes."""
    found: dict[Kind, list[fx.Node]] = {}
    for node, operator in lines.items():
        found.setdefault(operator.kind, []).append(node)
    return {kind: tuple(calls) for kind, calls in found.items()}


def products_by_call(lines: Mapping[fx.Node, Operator]) -> dict[fx.Node, tuple[Product, ...]]:
    """`products_of` every call that multiplies something."""
    return {node: made for node, line in lines.items() if line.form is not None and (made := line.form.products(node))}


_LAYERS = frozenset((Kind.CONTRACTION, Kind.CONVOLUTION, Kind.RECURRENT))


def is_layer(node: fx.Node) -> bool:
    """Whether a call sums over products with a matrix or a kernel, which norms and activations do not."""
    kind = kind_of(node)
    return kind in _LAYERS or (kind is Kind.DECLARED and bool(products_of(node)))


def add_operator(name: str, operator: Operator) -> None:
    """One more line. `name`: with its library for one of another library than torch. Everything that asks the table
    knows it from then on: rules, counts, budgets, recovery. Raises GraphPruneError for a name that has one."""
    if name in OPERATORS:
        raise GraphPruneError(f"operator {name!r} is in the table already")
    OPERATORS.add(name, operator)
    _known.clear()


def remove_operator(name: str) -> None:
    """Take a line out again."""
    OPERATORS.remove(name)
    _known.clear()


def declare(name: str, find: Callable[[fx.Node], tuple[Product, ...]]) -> None:
    """A user's operator, which `find` knows the products of."""
    _DECLARED[name] = Operator(Kind.DECLARED, Declared(find))
    _known.clear()


def undeclare(name: str) -> None:
    """Take it back."""
    del _DECLARED[name]
    _known.clear()


# Python's names for calls of the table.
_PYTHON = {
    "__matmul__": "matmul", "__rmatmul__": "matmul", "__add__": "add", "__radd__": "add", "__iadd__": "add_",
    "__sub__": "sub", "__rsub__": "rsub", "__isub__": "sub_", "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul_",
    "float": "to", "double": "to", "half": "to", "bfloat16": "to",
}  # fmt: skip


def function_name(function: Any) -> str:
    """The name in the table of what a `TorchFunctionMode` sees: a function or a method of torch, or an operator."""
    overload = target_name(function)
    if overload:
        return overload
    packet = getattr(function, "_qualified_op_name", None)
    if packet is not None:
        library, _, name = str(packet).partition("::")
        return name if library in BUILT_IN else str(packet)
    name = str(getattr(function, "__name__", ""))
    return _PYTHON.get(name, name)
