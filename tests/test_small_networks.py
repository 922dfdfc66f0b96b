"""Every small network is pruned exactly, or left alone with a reason: never wrong, never a crash."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from tests import oracles
from tests.examination import Demands, examine
from tests.networks import NETWORKS

FROZEN = frozenset(
    """
    across_channels_argmax across_channels_neighbours across_channels_sort across_channels_topk
    channel_attention efficient_channel_attention even_and_odd_channels fourier_channels fourier_low_pass
    fourier_space group_norms_unaligned halves_added_by_literal inplace_boolean_assignment inplace_index_add
    inplace_index_copy inplace_index_put inplace_scatter inplace_slice_strided inplace_swap_halves
    inplace_transposed_view keyword_inputs literal_flatten literal_heads local_response_norm masked_weight
    no_parameters nothing_to_prune overlapping_slices pairwise_distances prefilled_literal prefilled_narrow
    reorder_by_gather reorder_by_index_buffer reorder_by_index_list reorder_by_index_select rotary_complex
    scale_viewed_literal scaled_by_width single_channel_layers spatial_transformer split_literal_swap
    unbound_pairs unflatten_literal
    """.split()
)
"""Networks of which nothing can go at ratio 0.5, each for a reason of its own; all others become smaller."""
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


def test_all_others_become_smaller() -> None:
    frozen = set()
    for name, network in NETWORKS.items():
        model, example = network()
        plan = graphprune.plan(model, example, 0.5, fold_bn=False, ignore=network.ignore)
        if not any(indices for axes in plan.removed.values() for indices in axes.values()):
            frozen.add(name)
    assert frozen == FROZEN


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
