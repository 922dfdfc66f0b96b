"""Weights that are standardised before a convolution reads them: their statistics run over the channels it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune


class Standardised(nn.Conv2d):
    """Every filter less its mean, over its deviation, times a gain: by batch_norm of the weights or by hand."""

    def __init__(self, *arguments: int, by_hand: bool) -> None:
        super().__init__(*arguments)
        self.by_hand = by_hand
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        if self.by_hand:
            deviation, mean = torch.std_mean(flat, 2, keepdim=True, correction=0)
            flat = (flat - mean) / (deviation + 1e-6) * self.gain.view(1, -1, 1)
        else:
            flat = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias)


def build(widths: tuple[int, int], by_hand: bool) -> nn.Module:
    torch.manual_seed(0)
    first, second = Standardised(3, widths[0], 3, by_hand=by_hand), Standardised(*widths, 3, by_hand=by_hand)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(widths[1], 4, 1)).eval()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("output", ["module", "hybrid"])
def test_standardised_weights(by_hand: bool, output: str) -> None:
    """The same as a network that was built narrow and given the weights that stay."""
    model = build((8, 12), by_hand).double()
    example = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph = graphprune.trace(model, example)
    assert {group.kind for group in graph.groups} == {"channel"}
    assert sorted(group.size for group in graph.groups) == [8, 12]
    plan = graphprune.plan(model, example, 0.5, fold_bn=False, output=output, round_to=1)
    small = plan.apply(model)
    assert graphprune.verify(model, small, plan, example).passed

    left = {}
    for name, tensor in model.state_dict().items():
        for axis, gone in plan.removed.get(name, {}).items():
            kept = [i for i in range(tensor.shape[axis]) if i not in set(gone)]
            tensor = tensor.index_select(axis, torch.tensor(kept))
        left[name] = tensor
    narrow = build((4, 6), by_hand).double()
    narrow.load_state_dict(left)
    torch.testing.assert_close(small(example), narrow(example), rtol=1e-9, atol=1e-12)
