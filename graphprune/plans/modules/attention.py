"""`torch.nn.MultiheadAttention` with free widths, for the place of a pruned one.

That class computes `embed_dim // num_heads` and reshapes to `embed_dim`, so heads can never go while the embedding
stays. See `tracing.attention` for what is computed instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...tracing.attention import attend


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with free widths: the same parameters under the same names, the same arguments and
    results, without torch's fused inference path.

    Made from a pruned `torch.nn.MultiheadAttention` by `MultiheadAttention.of`, never by its constructor. `scale` is
    the attention temperature, (head features before pruning) ** -0.5, kept so that pruned features change nothing else.
    `num_heads` is the number of heads left; `embed_dim` the width of the query, `head_dim` the query features per head.
    """

    scale: float

    @classmethod
    def of(cls, module: nn.MultiheadAttention, scale: float) -> None:
        """Turn `module` into one of this class, in place: parameters, hooks, mode and further attributes stay."""
        module.__class__ = cls
        module.__dict__["scale"] = scale
        module._qkv_same_embed_dim = False  # keeps torch's encoder layers off the fused path, which ties the widths

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        if query.is_nested:
            return _attend_nested(self, query), None
        return attend(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


def _attend_nested(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Self-attention over the nested tensors that `torch.nn.TransformerEncoder` makes of padded batches."""
    padded = torch.nested.to_padded_tensor(x, 0.0)
    lengths = x._nested_tensor_size()[:, 0].to(padded.device)
    padding = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
    out, _ = attend(module, padded, padded, padded, padding, need_weights=False)
    return torch._nested_tensor_from_mask(out, ~padding, mask_check=False)
