"""Set what a module says about its own sizes: torch.nn's attributes from its tensors, the user's from the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...errors import GraphPruneError
from ...support.settings import is_named_tuple, is_settings_object, settings_of, with_setting
from ...tracing.attention import scale_of
from ..modules.attention import MultiheadAttention
from ..modules.recurrent import Recurrent


def attribute_at(modules: Mapping[str, nn.Module], module: str, name: str, key: tuple[int | str, ...]) -> int:
    """`<module>.<name>[key...]` of one of a model's modules, by path. Raises GraphPruneError where there is no such
    integer."""
    try:
        found: Any = modules[module].__dict__[name]
        for step in key:
            found = settings_of(found)[str(step)] if is_settings_object(found) else found[step]
    except (KeyError, IndexError, TypeError):
        found = None
    if type(found) is not int:
        where = (f"{module}.{name}" if module else name) + "".join(f"[{k!r}]" for k in key)
        raise GraphPruneError(f"the plan sets {where}, which is no number in this model")
    return found


def set_attribute(
    modules: Mapping[str, nn.Module], module: str, name: str, key: tuple[int | str, ...], value: int
) -> None:
    """`<module>.<name>[key...] = value` in one of a model's modules, by path; tuples are rebuilt. Settings objects,
    which modules of a copy share, are changed in place."""
    owner = modules.get(module)
    if owner is None:
        raise GraphPruneError(f"the plan sets {module}.{name}, but this model has no module {module}")
    if name not in owner.__dict__:
        raise GraphPruneError(f"the plan sets {module}.{name}, which this model does not have")
    owner.__dict__[name] = _with(owner.__dict__[name], key, value)


def _with(current: Any, key: tuple[int | str, ...], value: int) -> Any:
    if not key:
        return value
    if is_settings_object(current):
        name = str(key[0])
        return with_setting(current, name, _with(settings_of(current)[name], key[1:], value))
    inner = _with(current[key[0]], key[1:], value)
    if isinstance(current, tuple):
        items = list(current)
        items[int(key[0])] = inner
        return current._make(items) if is_named_tuple(current) else type(current)(items)  # type: ignore[attr-defined]
    current = current.copy()
    current[key[0]] = inner
    return current


def refresh(modules: Iterable[nn.Module]) -> None:
    """Make torch.nn's descriptive attributes agree with the tensors. What forward reads is set by the plan."""
    for module in modules:
        attention = isinstance(module, nn.MultiheadAttention)
        weight = None if attention or type(module) is nn.Sequential else getattr(module, "weight", None)
        if isinstance(module, nn.MultiheadAttention):
            _refresh_attention(module)
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, Recurrent)):
            _refresh_recurrent(module)
        if weight is None and isinstance(module, _NormBase):
            weight = module.running_mean  # affine=False
        if not isinstance(weight, Tensor):
            continue
        shape = weight.shape
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, _ConvNd):
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Bilinear):
            module.out_features, module.in1_features, module.in2_features = shape
        elif isinstance(module, _NormBase):
            module.num_features = shape[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(shape)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.num_embeddings, module.embedding_dim = shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = shape[0]


def _refresh_recurrent(module: nn.RNNBase | nn.RNNCellBase | Recurrent) -> None:
    # hidden_size is read by forward, so the plan has set it where it matters; cells read only their weights
    weight = getattr(module, "weight_ih" if isinstance(module, nn.RNNCellBase) else "weight_ih_l0", None)
    if isinstance(weight, Tensor):
        module.input_size = weight.shape[1]
    if isinstance(module, nn.RNNCellBase):
        module.hidden_size = module.weight_hh.shape[1]


def _refresh_attention(module: nn.MultiheadAttention) -> None:
    """Widths that torch's module cannot have, or another temperature: it becomes the one with free widths."""
    if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
        # a class of the user's own, whose code has decided what embed_dim is
        module.head_dim = module.embed_dim // module.num_heads
        if module._qkv_same_embed_dim:
            module.kdim = module.vdim = module.embed_dim
        return
    packed, values = module.in_proj_weight, module.out_proj.weight.shape[1]
    q, k, v = (packed,) * 3 if packed is not None else (
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    )  # fmt: skip
    queries = (packed.shape[0] - values) // 2 if packed is not None else q.shape[0]
    scale = scale_of(module)
    features = queries // module.num_heads
    fits = queries == values == q.shape[1] and features == module.head_dim
    module.embed_dim, module.kdim, module.vdim, module.head_dim = q.shape[1], k.shape[1], v.shape[1], features
    if not fits and type(module) is nn.MultiheadAttention:
        MultiheadAttention.of(module, scale)
