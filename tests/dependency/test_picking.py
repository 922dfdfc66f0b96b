"""Positions picked by an index tensor, pooled or convolved along one axis: other axes lose what they lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from tests.examination import Demands, examine


class RelativeScores(nn.Module):
    """Attention whose scores are those of a table, picked by the distance of two positions.

    `size`: how far the index reaches along the heads: as far as the scores, by a literal, or for one head only.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        self.size, self.heads, self.features = size, 4, 6
        self.query, self.value = nn.Linear(10, 24), nn.Linear(10, 24)
        self.table = nn.Linear(7, 24)
        self.out = nn.Linear(24, 3)
        self.register_buffer("distances", torch.randn(9, 7, generator=torch.Generator().manual_seed(1)))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.features).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, v, r = (self._split(y) for y in (self.query(x), self.value(x), self.table(self.distances)))
        scores = q @ r.transpose(-1, -2)
        steps = torch.arange(length)
        index = (steps[:, None] - steps[None, :] + length - 1).expand(q.size(0), q.size(1), -1, -1)
        if self.size == "literal":
            index = (steps[:, None] - steps[None, :] + length - 1).expand(q.size(0), 4, -1, -1)
        elif self.size == "one":
            index = index[:, :1]
        weights = torch.gather(scores, dim=-1, index=index).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape[0], length, self.heads * self.features))


def kinds(model: nn.Module, example: Any) -> dict[str, int]:
    groups = graphprune.trace(model, example).groups
    return {kind: sum(g.size for g in groups if g.kind == kind) for kind in sorted({g.kind for g in groups})}


@pytest.mark.parametrize("size", ["scores", "literal", "one"])
def test_gather(size: str) -> None:
    torch.manual_seed(0)
    model, example = RelativeScores(size).eval(), torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
    if size == "scores":
        assert kinds(model, example)["head"] == 4
    for seed in range(3):
        outcome = examine(model, example, Demands(prove=True, statistics=True, seed=seed))
        assert not outcome.failed, str(outcome)
    heads = graphprune.prune(model, example, 0.5, granularity="head", fold_bn=False)
    assert heads.query.out_features == (12 if size == "scores" else 24)


@pytest.mark.parametrize("kind", ["avg", "max", "indices"])
def test_a_window_of_one_position(kind: str) -> None:
    """Pooled along the length of a sequence: (batch, 1, length, channels), window (2, 1)."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.first(x)[:, None]
            if kind == "indices":
                y, where = F.max_pool2d(y, (2, 1), return_indices=True)
                return self.last(y), where
            y = F.avg_pool2d(y, (2, 1), ceil_mode=True) if kind == "avg" else F.max_pool2d(y, [2, 1], stride=[2, 1])
            return self.last(y[:, 0])

    torch.manual_seed(0)
    example = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    outcome = examine(Pooled().eval(), example, Demands(prove=True))
    assert not outcome.failed, str(outcome)
    assert (outcome.share > 0.3) == (kind != "indices")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_across_the_features(transposed: bool, kernel: int) -> None:
    """Two tokens are weighed into one, feature by feature; three taps mix neighbouring features."""

    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
            kind = nn.ConvTranspose1d if transposed else nn.Conv1d
            self.weigh = kind(2, 1, kernel, padding=kernel // 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.weigh(torch.stack((self.first(x), self.second(x)), 1))[:, 0])

    torch.manual_seed(0)
    example = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    outcome = examine(Weighed().eval(), example, Demands(prove=True))
    assert not outcome.failed, str(outcome)
    assert (outcome.share > 0.4) == (kernel == 1)


def test_windows_that_reach_across_the_channels_freeze_them() -> None:
    class Pooled(nn.Module):
        def __init__(self, window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.LazyLinear(3)
            self.pool = nn.AvgPool2d(window, stride, padding)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.pool(self.first(x)[:, None])[:, 0])

    example = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    for window, stride, padding in (((1, 2), (1, 2), (0, 0)), ((1, 1), (1, 2), (0, 0)), ((2, 2), (1, 1), (0, 1))):
        torch.manual_seed(0)
        model = Pooled(window, stride, padding).eval()
        model(example)
        outcome = examine(model, example, Demands(prove=True))
        assert not outcome.failed and outcome.share == 0, (window, str(outcome))
