"""Mixtures of experts, written as a list of modules and as stacked tensors."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ListedMixture(nn.Module):
    """The classic loop over a ModuleList."""

    def __init__(self, width: int = 8, experts: int = 6, top_k: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(width, experts, bias=bias)
        make = lambda: nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))  # noqa: E731
        self.experts = nn.ModuleList(make() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(torch.softmax(self.gate(flat), -1), self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for i in range(self.num_experts):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            out = out + share * self.experts[i](flat)
        return out.reshape(x.shape)


class StackedMixture(nn.Module):
    """Stacked tensors, a router module of its own, numbers from a shared settings object."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, width, experts = config, config.width, config.num_local_experts
        self.router = nn.Parameter(torch.randn(experts, width))
        self.up = nn.Parameter(torch.randn(experts, width, 10) / 3)
        self.up_bias = nn.Parameter(torch.randn(experts, 10))
        self.down = nn.Parameter(torch.randn(experts, 10, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logits, chosen = torch.topk(F.linear(flat, self.router), self.config.top_k, -1)
        picked = F.one_hot(chosen, self.config.num_local_experts).to(flat.dtype)
        share = (torch.softmax(logits, -1)[..., None] * picked).sum(1)
        hidden = F.silu(torch.einsum("nw,ewh->neh", flat, self.up) + self.up_bias)
        return torch.einsum("neh,ehw,ne->nw", hidden, self.down, share).reshape(x.shape)


class Transformer(nn.Module):
    def __init__(self, stacked: bool = False, experts: int = 6, top_k: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_local_experts=experts, top_k=top_k, width=8, layers=layers)
        self.inward = nn.Linear(5, 8)
        make = lambda: StackedMixture(self.config) if stacked else ListedMixture(8, experts, top_k)  # noqa: E731
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Needed(ListedMixture):
    """Averages over all experts too: none can go."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(e(x) for e in self.experts) / len(self.experts)
