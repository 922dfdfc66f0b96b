"""What the outputs decide: counted against a loop, and no repair that ruins it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.recovery.repair.decisions import decides_worse, rightly_decided


def counted(found: Tensor, wanted: Tensor) -> list[int]:
    """The slow way: place by place; the first of equal ones counts."""
    axis = 1 if wanted.dim() > 3 else wanted.dim() - 1
    found, wanted = (t.movedim(axis, -1) for t in (found, wanted))
    right = [0] * len(wanted)
    for place in itertools.product(*map(range, wanted.shape[:-1])):
        choices = [t[place].tolist() for t in (found, wanted)]
        right[place[0]] += len({values.index(max(values)) for values in choices}) == 1
    return right


@pytest.mark.parametrize("shape", [(7, 3), (5, 4, 3), (3, 4, 2, 5), (2, 3, 2, 2, 2)])
def test_places_decided_as_in_the_model(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    found, wanted = torch.randn(2, *shape, generator=generator).round()  # with equal ones
    assert rightly_decided(found, wanted, shape[0]).tolist() == counted(found, wanted)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 4, 4), (6, 5, 1)])
def test_nothing_to_choose_from(shape: tuple[int, ...]) -> None:
    assert rightly_decided(torch.randn(shape), torch.randn(shape), 6).tolist() == [0] * 6


def test_batches_that_count_no_samples_are_one() -> None:
    wanted = torch.randn(4, 3)
    assert rightly_decided(wanted, wanted, 1).tolist() == [4]


def test_one_lost_decision_counts_unless_the_error_falls_far() -> None:
    before = torch.ones(20)
    one, six = before.clone(), before.clone()
    one[0], six[:6] = 0, 0
    assert decides_worse(one, before, 0.6, 1.0) and not decides_worse(before, one, 0.6, 1.0)
    assert not decides_worse(one, before, 0.4, 1.0) and decides_worse(six, before, 0.4, 1.0)
    assert not decides_worse(before, before, 1.0, 1.0)


class Scores(nn.Module):
    """Four classes: what tells them apart lies in channels 0 to 3, which have the largest weights, and more of it in 4
    to 7; channel 8, which is always the same, puts the first class ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 9, bias=False), nn.Linear(9, 4)
        with torch.no_grad():
            self.a.weight.copy_(torch.cat([20 * torch.eye(4), torch.eye(4), torch.ones(1, 4)]))
            self.b.weight.copy_(torch.cat([0.1 * torch.eye(4), 4 * torch.eye(4), torch.full((4, 1), -3.0)], 1))
            self.b.weight[0, 8] = 0
            self.b.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("apart", [True, False])
def test_right_means_that_put_one_class_first_are_taken_back(apart: bool) -> None:
    """Without repair all decisions are right; with right means the error is smaller and three of four are wrong."""
    model = Scores().eval()
    x = nn.functional.one_hot(torch.arange(256) % 4, 4).float()
    plan = graphprune.plan(model, x[:2], 5 / 9, criterion="l2")
    small = plan.apply(model)
    assert plan.removed["a.weight"][0] == (4, 5, 6, 7, 8)
    assert torch.equal(model(x).argmax(1), torch.arange(256) % 4)
    assert torch.equal(small(x).argmax(1), torch.arange(256) % 4)
    found = graphprune.recover(model, plan, x[:2], list(x.split(16)) if apart else [x], "mean")
    assert torch.equal(found.model(x).argmax(1), torch.arange(256) % 4)
    assert "mean taken back: on held inputs the outputs were largest where the model's are" in str(found)
    fitted = graphprune.recover(model, plan, x[:2], list(x.split(16)), "least_squares")
    assert fitted.after < 1e-3 * fitted.before and torch.equal(fitted.model(x).argmax(1), torch.arange(256) % 4)
