"""Caches outside of the model hold nothing of a recording afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune

TABLE: dict[Any, Any] = {}
LISTED: list[Any] = []


class Net(nn.Module):
    masks: dict[Any, Any] = {}
    mask: Tensor | None = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h * self.scale(h))

    def scale(self, h: Tensor) -> Tensor:
        n = len(h)
        if self.kind == "global":
            if n not in TABLE:
                TABLE[n] = torch.full((n, 1), 2.0, device=h.device)
            return TABLE[n]
        if self.kind == "list":
            if not LISTED:
                LISTED.append(torch.full((n, 1), 2.0, device=h.device))
            return LISTED[0]
        if self.kind == "class dict":
            if n not in Net.masks:
                Net.masks[n] = torch.full((n, 1), 2.0, device=h.device)
            return Net.masks[n]
        if Net.mask is None:
            Net.mask = torch.full((n, 1), 2.0, device=h.device)
        return Net.mask


@pytest.mark.parametrize("kind", ["global", "list", "class dict", "class attribute"])
def test_a_cache_is_as_before_and_the_model_works(kind: str) -> None:
    TABLE.clear()
    LISTED.clear()
    Net.masks.clear()
    Net.mask = None
    TABLE["other"], x = "kept", torch.randn(2, 4)
    net = Net(kind).eval()
    plan = graphprune.plan(net, x, 0.5)
    assert len(plan.removed["first.weight"][0]) == 4
    assert TABLE == {"other": "kept"} and not LISTED and not Net.masks and Net.mask is None
    want = net(x)
    assert want.shape == (2, 3) and not want.is_meta
    filled = [*TABLE.values(), *LISTED, *Net.masks.values(), Net.mask]
    assert dict(graphprune.plan(net, x, 0.5).removed) == dict(plan.removed)
    assert all(a is b for a, b in zip(filled, [*TABLE.values(), *LISTED, *Net.masks.values(), Net.mask], strict=True))
    assert torch.equal(net(x), want)
