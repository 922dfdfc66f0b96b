"""Experts in one grouped product, whose kernel takes no double precision and wants rows of whole 16 bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune

grouped_mm = getattr(F, "grouped_mm", None)
pytestmark = pytest.mark.skipif(grouped_mm is None, reason="this version of torch has no grouped_mm")


class GroupedExperts(nn.Module):
    def __init__(self, experts: int = 3, width: int = 24, hidden: int = 20) -> None:
        super().__init__()
        self.embed = nn.Linear(10, width)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * hidden, width) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * 0.3)
        self.out = nn.Linear(width, 4)
        self.register_buffer("offsets", torch.tensor([2, 5, 9], dtype=torch.int32))
        self.offsets: Tensor

    def forward(self, x: Tensor) -> Tensor:
        assert grouped_mm is not None
        rows = self.embed(x)
        gate, up = grouped_mm(rows, self.gate_up.transpose(1, 2), offs=self.offsets).chunk(2, -1)
        made = grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=self.offsets)
        answer: Tensor = self.out(rows + made)
        return answer


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_widths_are_cut_and_stay_multiples(ratio: float) -> None:
    torch.manual_seed(0)
    model, x = GroupedExperts().eval(), torch.randn(9, 10)
    plan = graphprune.plan(model, x, ratio)
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, x)
    assert report.passed, report
    experts, double_hidden, width = small.gate_up.shape
    assert experts == 3 and width % 4 == 0 and double_hidden % 8 == 0
    assert width < 24 and double_hidden < 40

    # the same by hand: the kept rows and columns, one expert at a time
    kept_width = [i for i in range(24) if i not in plan.removed["gate_up"][2]]
    kept = [i for i in range(20) if i not in plan.removed["down"][2]]
    rows = model.embed(x)[:, kept_width]
    made = []
    for expert, (start, stop) in enumerate(((0, 2), (2, 5), (5, 9))):
        both = model.gate_up[expert][:, kept_width]
        gate, up = rows[start:stop] @ both[kept].T, rows[start:stop] @ both[[20 + i for i in kept]].T
        made.append(F.silu(gate) * up @ model.down[expert][kept_width][:, kept].T)
    expected = F.linear(rows + torch.cat(made), model.out.weight[:, kept_width], model.out.bias)
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
