"""Random networks with sizes as literals: each exact, in both output modes, at other sizes, folded or not."""

from __future__ import annotations

import pytest
import torch

from tests.examination import Demands, examine
from tests.networks.registry import settle
from tests.plans.rewriting.random_literals import random_literals


@pytest.mark.parametrize("seed", range(24))
def test_exact(seed: int) -> None:
    model, example, larger = random_literals(seed)
    torch.manual_seed(seed)
    settle(model)
    demands = Demands(
        ratio=0.3 + 0.02 * (seed % 15),
        output=("hybrid", "graph")[seed % 2],
        fold_bn=seed % 3 == 0,
        larger=larger,
        prove=True,
        permuted_groups=2,
        seed=seed,
    )
    outcome = examine(model, example, demands)
    assert not outcome.failed, outcome
    assert outcome.share > 0.1, outcome
