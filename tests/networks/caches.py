"""Models that hand back, beside their answer, what they want to read again in the next step."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .registry import network, tokens


class KeyValueCache:
    """Keys and values of the steps so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


@network(tokens(6, 10), temperature=True)
class ReturnsItsCache(nn.Module):
    """Causal attention with fewer key-value heads than query heads; the cache is part of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shared, self.features = 4, 2, 6
        self.query = nn.Linear(10, 24)
        self.key, self.value = nn.Linear(10, 12), nn.Linear(10, 12)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, KeyValueCache]:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, heads, self.features).transpose(1, 2)
            for layer, heads in ((self.query, self.heads), (self.key, self.shared), (self.value, self.shared))
        )
        times = self.heads // self.shared
        cache = KeyValueCache(k, v)
        mixed = F.scaled_dot_product_attention(
            q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), is_causal=True
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), cache
