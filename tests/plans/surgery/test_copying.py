"""What a copy with other parameters inherits, and what it must not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphprune


class RemembersItsBias(nn.Module):
    """Eval mode computes the attention bias once for each device and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv = nn.Linear(8, 3 * 4 * 5)
        self.bias = nn.Parameter(torch.randn(4, 7))
        self.out = nn.Linear(20, 3)
        self.register_buffer("offsets", (torch.arange(5)[:, None] - torch.arange(5)[None]).abs(), persistent=False)
        self.offsets: Tensor
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        key = str(x.device)
        if key not in self.kept:
            self.kept[key] = self.bias[:, self.offsets]
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) + self.kept[key]).softmax(-1)
        answer: Tensor = self.out((scores @ v).transpose(1, 2).flatten(2))
        return answer


def test_values_computed_from_old_parameters_are_left_behind() -> None:
    torch.manual_seed(0)
    model, x = RemembersItsBias().eval(), torch.randn(2, 5, 8)
    model.requires_grad_(False)
    fresh = graphprune.plan(model, x, {"*": 0.5}, granularity="heads")
    assert fresh.caches == (("", "kept"),)
    expected = fresh.apply(model)(x)

    before = model(x)  # now there is something to inherit
    assert list(model.kept) == ["cpu"]
    small = graphprune.prune(model, x, 0.5, granularity="heads")  # verified, too
    assert small.bias.shape == (2, 7)
    torch.testing.assert_close(small(x), expected)
    torch.testing.assert_close(model(x), before)
    assert model.kept["cpu"].shape == (4, 5, 5)


def test_the_file_of_a_plan_names_them() -> None:
    model, x = RemembersItsBias().eval(), torch.randn(2, 5, 8)
    plan = graphprune.plan(model, x, 0.5)
    assert graphprune.Plan.from_dict(plan.to_dict()).caches == plan.caches == (("", "kept"),)
