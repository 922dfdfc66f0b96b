"""Multi-head attention whose number of heads, head widths and input widths are independent of each other.

`torch.nn.MultiheadAttention` computes `embed_dim // num_heads` and reshapes to `embed_dim`, so heads can never go while
the embedding stays. Everything here is read off the weights instead: with H = num_heads, the projections have
H * (features of q and k), the same again, and H * (features of v) rows; `out_proj` reads H * (features of v).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .origin import plain
from .patches import Patch


def scale_of(module: nn.MultiheadAttention) -> float:
    """The attention temperature of a module, as a plain number."""
    own = module.__dict__.get("scale")
    return float(plain(module.head_dim) ** -0.5) if own is None else float(own)


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.MultiheadAttention.forward` computes, for any widths."""
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal needs attn_mask: it only says that the mask is the causal one")
    batched = query.dim() == 3
    q, k, v = _projected(module, *(_batch_first(x, batched, module.batch_first) for x in _shared(query, key, value)))
    padding = _additive(key_padding_mask, query.dtype)
    if padding is not None and not batched:
        padding = padding.unsqueeze(0)
    mask = _additive(attn_mask, query.dtype)
    causal = is_causal and padding is None and not need_weights
    if causal:
        mask = None
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(v.shape[0], -1, -1)], 1)
    q, k, v = (x.view(x.shape[0], x.shape[1], module.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3])], 2) for x in (k, v))
    added = int(module.bias_k is not None) + int(module.add_zero_attn)
    mask = _joined(module, mask, padding, q.shape[0], added)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q * scale_of(module)) @ k.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        out = weights @ v
        if average_attn_weights:
            weights = weights.mean(1)
        weights = weights if batched else weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale_of(module))
    out = F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if not batched:
        return out.squeeze(0), weights
    return (out if module.batch_first else out.transpose(0, 1)), weights


def _shared(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The different ones among the three, in order; one tensor that is all of them stays one."""
    if query is key and key is value:
        return (query,)
    return (query, key, value)


def _batch_first(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    if not batched:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def _projected(module: nn.MultiheadAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of shape (batch, tokens, heads * features)."""
    bias = module.in_proj_bias
    packed: Tensor | None = module.in_proj_weight  # None where the inputs differ in width
    values = module.out_proj.weight.shape[1]
    if packed is not None:
        queries = (packed.shape[0] - values) // 2
        sizes = [queries, queries, values]
        if len(inputs) == 1:
            return tuple(F.linear(inputs[0], packed, bias).split(sizes, -1))
        parts: tuple[Tensor, ...] = tuple(packed.split(sizes))
    else:
        parts = tuple(getattr(module, f"{name}_proj_weight") for name in "qkv")
        sizes = [part.shape[0] for part in parts]
        inputs = inputs * 3 if len(inputs) == 1 else inputs
    biases = (None, None, None) if bias is None else bias.split(sizes)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, parts, biases, strict=True))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """True, "not allowed", as minus infinity."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _joined(
    module: nn.MultiheadAttention, mask: Tensor | None, padding: Tensor | None, batch: int, added: int
) -> Tensor | None:
    """Both masks as one that broadcasts to (batch, heads, queries, keys); keys that the module adds are allowed."""
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.view(batch, module.num_heads, mask.shape[1], mask.shape[2])
        mask = F.pad(mask, (0, added)) if added else mask
    if padding is not None:
        padding = padding[:, None, None, :]
        padding = F.pad(padding, (0, added)) if added else padding
    if mask is None or padding is None:
        return padding if mask is None else mask
    return mask + padding


def _openly(original: Any) -> Any:
    def forward(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        if type(module) is nn.MultiheadAttention and not any(isinstance(a, Tensor) and a.is_nested for a in args):
            return attend(module, *args, **kwargs)
        return original(module, *args, **kwargs)

    return forward


# `torch.nn.MultiheadAttention` computes as the module that will stand in its place. Its subclasses with a forward of
# their own are left alone.
RECORDED_OPENLY = Patch(nn.MultiheadAttention, "forward", _openly)
