"""Every small network is pruned exactly, or left alone with a reason: never wrong, never a crash."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from tests import oracles
from tests.examination import Demands, examine
from tests.networks import NETWORKS

MINIMUM_SHRUNK = 0
"""How many of the networks have to become smaller at ratio 0.5."""
WITH_BATCH_NORM = [
    name
    for name, network in NETWORKS.items()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network()[0].modules())
]


def _demands(name: str, **options: object) -> tuple[nn.Module, object, Demands]:
    network = NETWORKS[name]
    model, example = network()
    demands = Demands(
        ignore=network.ignore,
        statistics=network.statistics,
        temperature=network.temperature,
        larger=network.larger_batch(example),
        **options,  # type: ignore[arg-type]
    )
    return model, example, demands


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_channels(name: str) -> None:
    model, example, demands = _demands(name)
    outcome = examine(model, example, demands)
    assert not outcome.failed, f"{name}: {outcome}"


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_with_folded_norms(name: str) -> None:
    model, example, demands = _demands(name, fold_bn=True, permuted_groups=0)
    outcome = examine(model, example, demands)
    assert not outcome.failed, f"{name}: {outcome}"


@pytest.mark.parametrize("name", list(NETWORKS)[::3])
def test_a_third_of_the_channels_proven(name: str) -> None:
    model, example, demands = _demands(name, ratio=0.3, permuted_groups=0, prove=True, seed=1)
    outcome = examine(model, example, demands)
    assert not outcome.failed, f"{name}: {outcome}"


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.ignore])
def test_ignored_outputs_stay(name: str) -> None:
    model, example = NETWORKS[name]()
    ignored = NETWORKS[name].ignore
    plan = graphprune.plan(model, example, 0.5, ignore=ignored, fold_bn=False)
    assert any(plan.removed.values())
    for module in ignored:
        assert not plan.removed.get(f"{module}.weight", {}).get(0)


def test_how_many_become_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = []
    for name, network in NETWORKS.items():
        model, example = network()
        plan = graphprune.plan(model, example, 0.5, fold_bn=False, ignore=network.ignore)
        if not any(indices for axes in plan.removed.values() for indices in axes.values()):
            frozen.append(name)
    shrunk = len(NETWORKS) - len(frozen)
    with capsys.disabled():
        print(f"\n{shrunk} of {len(NETWORKS)} small networks become smaller; not: {', '.join(frozen)}")
    assert shrunk >= MINIMUM_SHRUNK


def test_networks_are_fit_to_be_judged() -> None:
    """The same every time, finite, of moderate size, sensitive to the batch, and exact without any pruning."""
    for name, network in NETWORKS.items():
        (model, example), (again, _) = network(), network()
        outputs = oracles.call(oracles.double_copy(model), oracles.double(example))
        repeated = oracles.call(oracles.double_copy(again), oracles.double(example))
        assert oracles.relative_error(outputs, repeated) == 0, name
        assert oracles.relative_error(oracles.absent_output(model, {}, example), outputs) < 1e-9, name
        for tensor in oracles.tensors_in(outputs):
            assert bool(tensor.isfinite().all()), name
            assert tensor.numel() < 5 or 0.01 < float(tensor.double().std()) < 30, name
        larger = network.larger_batch(example)
        if larger is not None:
            found = oracles.tensors_in(oracles.call(oracles.double_copy(model), oracles.double(larger)))
            assert all(bool(torch.isfinite(t).all()) for t in found), name
