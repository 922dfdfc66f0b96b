"""The same property for networks in another style: functions on bare parameters, in three precisions. 120 per run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import graphprune
from tests import oracles
from tests.examination import PRECISIONS, Outcome, examine_program
from tests.networks import random_program
from tests.networks.random_programs import STEPS

SEEDS = 120
PER_TEST = 12


@pytest.mark.parametrize("start", range(0, SEEDS, PER_TEST))
def test_random_programs_are_pruned_exactly_and_no_alarm_is_false(start: int) -> None:
    failures: dict[int, Outcome] = {}
    for seed in range(start, start + PER_TEST):
        outcome = examine_program(seed)
        if outcome.failed:
            failures[seed] = outcome
    assert not failures, "\n".join(f"seed {seed}: {outcome}" for seed, outcome in failures.items())


def test_most_random_programs_become_smaller() -> None:
    shares = [examine_program(seed, permuted_groups=0).share for seed in range(SEEDS, SEEDS + 30)]
    assert np.mean([share > 0.1 for share in shares]) > 0.8


def test_random_programs_are_fit_to_be_judged() -> None:
    forms, kinds = set(), Counter[str]()
    for seed in range(90):
        dtype = PRECISIONS[seed % 3]
        (model, example), (again, _) = random_program(seed, dtype), random_program(seed, dtype)
        assert {t.dtype for t in (example, *model.parameters())} == {dtype}
        outputs = oracles.call(oracles.double_copy(model), oracles.double(example))
        assert oracles.relative_error(outputs, oracles.call(oracles.double_copy(again), oracles.double(example))) == 0
        for tensor in oracles.tensors_in(outputs):
            assert bool(tensor.isfinite().all()) and 0.01 < float(tensor.std()) < 30, seed
        forms.add(model.form)
        kinds.update(step.kind for step in model.steps)
    assert forms == {"tensor", "tuple", "record", "nest", "pair"}
    assert set(kinds) == set(STEPS)


def test_a_wrong_plan_is_not_taken_for_right() -> None:
    """The examination would see it: a step that reads other channels than those that were kept."""
    model, example = random_program(0)
    plan = graphprune.plan(model, example, 0.5, fold_bn=False)
    small = plan.apply(model)
    with torch.no_grad():
        for name in plan.removed:
            small.get_parameter(name).mul_(1.5).add_(0.1)
    reference = oracles.zero_reference(model, {n: dict(axes) for n, axes in plan.removed.items()})
    outputs = [oracles.call(net, oracles.double(example)) for net in (oracles.double_copy(small), reference)]
    assert oracles.relative_error(*outputs) > 1e-6
    assert not graphprune.verify(model, small, plan, example).passed
