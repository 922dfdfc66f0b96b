"""Conv-BN folding, decided by the data flow: y = BN(W x + b) becomes y = W' x + b'.

In eval mode a batch norm is y = (z - mean) * gamma / sqrt(var + eps) + beta per channel, so with s = gamma /
sqrt(var + eps): W' = s W (per output channel) and b' = (b - mean) s + beta (Jacob et al., CVPR 2018, section 3.2).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ...dependency.reparametrised import reparametrised
from ...errors import GraphPruneError
from ...support.walking import all_modules
from ...tracing.operators import Kind, Layer, Operator, Sliding, given
from ...tracing.trace import Trace
from .copying import clone_with


@dataclasses.dataclass(frozen=True)
class Fold:
    """A batch norm that can be folded into the layer before it. Both are module paths.

    `axis` is the output axis of the layer's weight: 0, or 1 for a transposed convolution.
    """

    layer: str
    batch_norm: str
    axis: int


def find_folds(model: nn.Module, trace: Trace) -> list[Fold]:
    """Every batch norm whose input is made by one convolution or linear layer and read by nothing else, and in whose
    place nn.Identity can be put."""
    return [fold for fold, replaceable in effective_folds(model, trace) if replaceable]


def effective_folds(model: nn.Module, trace: Trace) -> list[tuple[Fold, bool]]:
    """Every batch norm fed by one layer alone, and whether nn.Identity can be put in its place.

    It cannot where its module does more (an activation, hooks). The layer's effective filters are the folded ones all
    the same, which is what importance looks at.
    """
    modules = all_modules(model)
    names = Counter(trace.aliases.values())
    folds = []
    for node in stored_norms(trace):
        fold = _fold_of(node, trace, modules)
        if fold is not None and names[fold_names(fold)[0]] == 1:
            folds.append((fold, _replaceable(fold, node, modules)))
    return folds


def stored_norms(trace: Trace) -> list[fx.Node]:
    """The batch norms of a run that take stored statistics."""
    return [node for node in trace.calls.get(Kind.BATCH_NORM, ()) if _takes_stored(node, trace.lines[node])]


def _takes_stored(norm: fx.Node, line: Operator) -> bool:
    """Whether a batch norm takes stored statistics, not those of the batch itself."""
    said = line.own_statistics
    return not said if isinstance(said, bool) else not given(norm, said)


def _replaceable(fold: Fold, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Does the batch norm's module run this call and nothing else, and will the layer add the bias it may be given?"""
    layer, producer = modules[fold.layer], node.all_input_nodes[0]
    if node.meta["module"] != fold.batch_norm or not _does_nothing_else(modules[fold.batch_norm]):
        return False
    if reparametrised(layer):
        return False  # whoever trains it goes on with what its weight is computed from
    return isinstance(layer.bias, Tensor) or (producer.meta["module"] == fold.layer and _uses_bias(layer))


def _fold_of(node: fx.Node, trace: Trace, modules: dict[str, nn.Module]) -> Fold | None:
    producer = node.args[0]
    if not isinstance(producer, fx.Node) or len(producer.users) != 1:
        return None
    product = next(iter(trace.products.get(producer, ())), None)
    if product is None or product.result_axis != 1 or not isinstance(trace.lines[producer].form, (Layer, Sliding)):
        return None  # not made by a layer, or a batch norm over the tokens of a sequence
    weight, bias = product.weight, product.bias
    layer = _owner(weight, "weight", modules, (_ConvNd, nn.Linear))
    batch_norm = _owner(node.args[3], "running_mean", modules, (_BatchNorm,))
    if layer is None or batch_norm is None:
        return None
    for parameter in (weight, bias, *node.args[1:5]):
        # shared with another call, or computed on the fly: folding here would change something else
        if parameter is not None and (not isinstance(parameter, fx.Node) or len(parameter.users) != 1):
            return None
        if parameter is not None and "parameter" not in parameter.meta:
            return None
    fold = Fold(layer, batch_norm, product.produces[0])
    own = fold_names(fold)[1] if modules[layer].bias is not None else None
    used = bias.meta["parameter"] if isinstance(bias, fx.Node) else None
    return fold if used == own else None  # else the call leaves the layer's bias out, or adds another


def _owner(node: Any, attribute: str, modules: dict[str, nn.Module], kinds: tuple[type, ...]) -> str | None:
    """The path of the module whose parameter this node is."""
    name = node.meta.get("parameter") if isinstance(node, fx.Node) else None
    if name is None:
        return None
    path, _, last = name.rpartition(".")
    return path if last == attribute and isinstance(modules.get(path), kinds) else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _does_nothing_else(norm: nn.Module) -> bool:
    """May nn.Identity take the module's place? Not where its class adds an activation, or hooks hang on it."""
    own = type(norm).forward.__module__.startswith("torch.nn") and "forward" not in norm.__dict__
    return own and not any(getattr(norm, hooks) for hooks in _HOOKS)


def _uses_bias(layer: nn.Module) -> bool:
    """Would a bias be added if the module had one? True for torch's own forward and for those that call or name it."""
    forward = type(layer).forward
    if "forward" in layer.__dict__:
        return False
    if forward.__module__.startswith("torch.nn"):
        return True
    code = getattr(forward, "__code__", None)
    return code is not None and bool({"super", "bias"} & set(code.co_names))


def check_folds(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Raise GraphPruneError unless `model` has these layers and batch norms, and they fit each other."""
    modules = all_modules(model)
    for fold in folds:
        layer, norm = modules.get(fold.layer), modules.get(fold.batch_norm)
        statistics = getattr(norm, "running_mean", None)
        if not isinstance(norm, _BatchNorm) or not isinstance(statistics, Tensor):
            raise GraphPruneError(f"the plan folds {fold.batch_norm}, which is no batch norm with statistics")
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            raise GraphPruneError(f"the plan folds {fold.batch_norm} into {fold.layer}, which is no layer with weights")
        transposed = isinstance(layer, _ConvNd) and layer.transposed
        outputs = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
        if fold.axis != int(transposed) or len(statistics) != outputs:
            raise GraphPruneError(
                f"the plan folds {fold.batch_norm} of {len(statistics)} channels along axis {fold.axis} of "
                f"{fold.layer}.weight, whose {outputs} outputs lie along axis {int(transposed)}"
            )


# What is left of a weight and of the factors of its outputs, by the name of the weight
Cut = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


def folded_tensors(model: nn.Module, folds: list[Fold], cut: Cut | None = None) -> dict[str, Tensor]:
    """New weights and biases by parameter name, computed in float32 or better and returned in the layer's dtype.

    `cut`: what of the weights is wanted, where only part of them is; biases are whole."""
    modules = all_modules(model)
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for fold in folds:
            layer, norm = modules[fold.layer], modules[fold.batch_norm]
            assert isinstance(layer, (_ConvNd, nn.Linear)) and isinstance(norm, _BatchNorm)
            weight_name, bias_name = fold_names(fold)
            weight = layer.weight.detach()
            scale, shift = _scale_and_shift(layer, norm)
            out[bias_name] = shift.to(weight.dtype)
            if cut is not None:
                weight, scale = cut(weight_name, weight, scale)
            own = cut is not None and weight.untyped_storage()._cdata != layer.weight.untyped_storage()._cdata
            out[weight_name] = scale_filters(weight, scale, fold.axis, layer, own).to(weight.dtype)
    return out


def _scale_and_shift(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """By what the outputs of a layer without bias are multiplied and what is added: s and b' of the module's text."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)  # type: ignore[union-attr]
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    shift = -norm.running_mean.to(dtype) * scale  # type: ignore[union-attr]
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(dtype)
    if layer.bias is not None:
        shift = shift + layer.bias.detach().to(dtype) * scale
    return scale, shift


def scale_filters(weight: Tensor, scale: Tensor, axis: int, layer: nn.Module, own: bool = False) -> Tensor:
    """The weight of `layer` with output channels, along `axis` of its weight, multiplied by `scale`. `own`: the weight
    is nobody else's and may be written to."""
    view = [1] * weight.dim()
    view[axis] = -1
    if axis == 0:
        if own and weight.dtype == scale.dtype:
            return weight.mul_(scale.reshape(view))
        return weight.to(scale.dtype) * scale.reshape(view)
    groups = int(layer.groups)  # type: ignore[arg-type]
    # transposed: (in, out / groups, ...); input channel block g makes output channels of group g
    parts = weight.to(scale.dtype).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    by_group = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (parts * by_group).reshape(weight.shape)


def fold_names(fold: Fold) -> tuple[str, str]:
    """The names of the layer's weight and bias."""
    prefix = f"{fold.layer}." if fold.layer else ""
    return prefix + "weight", prefix + "bias"


def apply_folds(model: nn.Module, folds: Sequence[Fold]) -> nn.Module:
    """A copy of `model` with these batch norms merged into their layers."""
    folded = folded_tensors(model, list(folds))
    return clone_with(model, folded, {fold.batch_norm: nn.Identity() for fold in folds})
