"""Each built-in criterion against its formula written as loops, and the choice of what it looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.dependency.groups import Group
from graphprune.errors import GraphPruneError
from graphprune.importance import BatchNormLink, ImportanceContext, geometric, normalise, resolve_criterion
from graphprune.importance.magnitude import judged_members, lamp_scores

from . import reference
from .reference import blocks, every, group, randn


def score(name: str, g: Group, tensors: dict[str, Tensor], model: nn.Module | None = None, seed: int = 0) -> np.ndarray:
    return resolve_criterion(name)(ImportanceContext(model or nn.Module(), tensors, seed=seed), g)


@st.composite
def judged(draw: st.DrawFn) -> tuple[Group, dict[str, Tensor]]:
    """A group of 1-3 producing layers (Linear, convolution, transposed), with k per layer, plus other members."""
    units = draw(st.integers(1, 6))
    tensors: dict[str, Tensor] = {}
    members = []
    for n in range(draw(st.integers(1, 3))):
        k = draw(st.integers(1, 3))
        spatial = draw(st.sampled_from([(), (1, 1), (3, 2), (2,)]))
        axis = draw(st.sampled_from([0, 1])) if spatial else 0
        shape = [draw(st.integers(1, 4)), *spatial]
        shape.insert(axis, units * k + draw(st.integers(0, 2)))
        order = np.array(draw(st.permutations(range(shape[axis]))), dtype=np.int64)
        tensors[f"out{n}"] = randn(*shape, seed=draw(st.integers(0, 99)))
        members.append((f"out{n}", axis, order[: units * k].reshape(units, k), "out"))
    tensors["bias"], tensors["next"] = randn(units, seed=7), randn(3, units, seed=8)
    members += [("bias", 0, every(units), "vector"), ("next", 1, every(units), "in")]
    return group(members), tensors


@settings(max_examples=80)
@given(judged(), st.sampled_from([("l1", 1), ("l2", 2)]))
def test_magnitude_is_the_mean_norm_of_the_producing_layers(
    case: tuple[Group, dict[str, Tensor]], criterion: tuple[str, int]
) -> None:
    g, tensors = case
    expected = reference.mean_norms(tensors, [m for m in g.members if m.role == "out"], criterion[1])
    np.testing.assert_allclose(score(criterion[0], g, tensors), expected, rtol=1e-5)


@settings(max_examples=80)
@given(judged())
def test_lamp_follows_its_formula(case: tuple[Group, dict[str, Tensor]]) -> None:
    g, tensors = case
    expected = reference.lamp(reference.mean_norms(tensors, [m for m in g.members if m.role == "out"], 2))
    np.testing.assert_allclose(score("lamp", g, tensors), expected, rtol=1e-4)


@settings(max_examples=80)
@given(judged())
def test_fpgm_sums_the_distances(case: tuple[Group, dict[str, Tensor]]) -> None:
    g, tensors = case
    out = [m for m in g.members if m.role == "out"]
    sums = [reference.distance_sums(tensors[m.parameter], m.axis, m.positions) for m in out]
    np.testing.assert_allclose(score("fpgm", g, tensors), np.mean(sums, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp"])
def test_scores_move_with_the_units(name: str) -> None:
    tensors = {"w": randn(8, 3, 3, 3)}
    order = np.random.default_rng(0).permutation(8)
    plain = score(name, group([("w", 0, every(8), "out")]), tensors)
    np.testing.assert_allclose(score(name, group([("w", 0, every(8)[order], "out")]), tensors), plain[order], rtol=1e-9)


# What a group is judged by


def test_without_a_producer_the_consumers_are_judged() -> None:
    tensors = {"bias": randn(4), "next": randn(3, 4, 2, seed=2), "other": randn(4, seed=3)}
    g = group([("bias", 0, every(4), "vector"), ("next", 1, every(4), "in"), ("other", 0, every(4), "out")])
    expected = [reference.norm(tensors["next"], 1, [u], 2) for u in range(4)]
    np.testing.assert_allclose(score("l2", g, tensors), expected, rtol=1e-6)
    expected = reference.distance_sums(tensors["next"], 1, every(4))
    np.testing.assert_allclose(score("fpgm", g, tensors), expected, rtol=1e-6)


def test_vectors_alone_are_judged_without_running_statistics() -> None:
    tensors = {
        "norm.weight": randn(4, seed=1),
        "norm.bias": randn(4, seed=2),
        "norm.running_mean": randn(4, seed=3) * 100,
        "norm.running_var": randn(4, seed=4) * 100,
        "position": randn(5, 4, seed=5),
    }
    vectors = [(name, 0, every(4), "vector") for name in tensors if name != "position"]
    g = group([*vectors, ("position", 1, every(4), "other")])
    kept = [m for m in g.members if "running" not in m.parameter]
    assert judged_members(ImportanceContext(nn.Module(), tensors), g) == kept
    np.testing.assert_allclose(score("l1", g, tensors), reference.mean_norms(tensors, kept, 1), rtol=1e-6)


def test_a_group_without_any_value_counts_every_unit_the_same() -> None:
    g = group([("steps", 0, every(3), "vector"), ("n.running_var", 0, every(3), "vector")])
    tensors = {"steps": torch.zeros(3, dtype=torch.long), "n.running_var": torch.rand(3)}
    for name in ("l1", "l2", "fpgm"):
        assert score(name, g, tensors).tolist() == [1.0, 1.0, 1.0]


# LAMP in particular


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e-200, 1e200]), min_size=1, max_size=8))
def test_lamp_with_ties_zeros_and_extremes(magnitudes: list[float]) -> None:
    got = lamp_scores(np.array(magnitudes))
    scaled = [m / max(magnitudes) if max(magnitudes) else 0.0 for m in magnitudes]
    np.testing.assert_allclose(got, reference.lamp(scaled), rtol=1e-12)
    assert math.isclose(got.max(), 1.0) or max(magnitudes) == 0.0


def test_lamp_ties_rank_the_lower_index_higher() -> None:
    np.testing.assert_allclose(lamp_scores(np.array([1.0, 1.0, 1.0, 1.0])), [1, 1 / 2, 1 / 3, 1 / 4])


# FPGM in particular


@pytest.mark.parametrize("entries", [1, 30, 200])
def test_fpgm_in_blocks(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(geometric, "_ENTRIES", entries)
    matrix = randn(13, 17)
    expected = reference.distance_sums(matrix, 0, every(13))
    np.testing.assert_allclose(geometric.distance_sums(matrix), expected, rtol=1e-9)


def test_fpgm_sees_equal_filters_far_from_the_origin() -> None:
    matrix = torch.full((5, 9), 1000.0)
    matrix[4, 0] = 1001.0
    np.testing.assert_allclose(geometric.distance_sums(matrix), [1, 1, 1, 1, 4], rtol=1e-3)


def test_fpgm_of_equal_filters() -> None:
    matrix = randn(20, 301).repeat(2, 1)  # each filter twice
    expected = reference.distance_sums(matrix, 0, every(40))
    np.testing.assert_allclose(geometric.distance_sums(matrix), expected, rtol=1e-6)


def test_fpgm_of_one_filter_is_zero() -> None:
    assert geometric.distance_sums(randn(1, 4)).tolist() == [0.0]


# BatchNorm scale


def bn_model() -> nn.ModuleDict:
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)})
    nn.init.normal_(model["bn"].weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(model["bn2"].weight, generator=torch.Generator().manual_seed(2))
    return model


def test_bn_scale_is_the_mean_over_the_groups_norms() -> None:
    model = bn_model()
    g = group(
        [
            ("conv.weight", 0, every(4), "out"),
            ("bn.weight", 0, every(4)[::-1], "vector"),
            ("bn.running_var", 0, every(4), "vector"),
            ("bn2.weight", 0, every(4), "vector"),
        ]
    )
    first, second = (model[name].weight.tolist() for name in ("bn", "bn2"))
    expected = [(abs(first[3 - u]) + abs(second[u])) / 2 for u in range(4)]
    np.testing.assert_allclose(score("bn_scale", g, dict(model.named_parameters()), model), expected, rtol=1e-6)


def test_bn_scale_of_a_folded_convolution() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3)})
    gamma = randn(4)
    context = ImportanceContext(model, dict(model.named_parameters()), bn={"conv.weight": BatchNormLink(gamma)})
    got = resolve_criterion("bn_scale")(context, group([("conv.weight", 0, every(4), "out")]))
    np.testing.assert_allclose(got, gamma.abs(), rtol=1e-6)


def test_bn_scale_ranks_a_group_without_bn_as_an_average_one() -> None:
    model = bn_model()
    tensors = dict(model.named_parameters())
    g = group([("conv.weight", 0, every(4), "out")])
    got = score("bn_scale", g, tensors, model)
    gammas = [abs(v) for bn in ("bn", "bn2") for v in model[bn].weight.tolist()]
    assert got.mean() == pytest.approx(sum(gammas) / len(gammas))
    norms = score("l2", g, tensors)
    np.testing.assert_allclose(got / got.mean(), norms / norms.mean(), rtol=1e-9)


def test_bn_scale_needs_a_bn() -> None:
    with pytest.raises(GraphPruneError, match="no BatchNorm layer with a scale"):
        score("bn_scale", group([("w", 0, every(2), "out")]), {"w": randn(2, 2)})


# Random


def test_random_repeats_with_the_seed_and_reads_no_weight() -> None:
    tensors = {"w": torch.empty(6, 2, device="meta")}
    g, other = (group([("w", 0, every(6), "out")], index=n) for n in (3, 4))
    first = score("random", g, tensors, seed=5)
    assert np.array_equal(first, score("random", g, tensors, seed=5))
    assert not np.array_equal(first, score("random", g, tensors, seed=6))
    assert not np.array_equal(first, score("random", other, tensors, seed=5))
    assert ((first >= 0) & (first < 1)).all()


# Across groups


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.sampled_from(["mean", "max", "sum"]))
def test_normalise_keeps_the_order_and_sets_the_scale(scores: list[float], how: str) -> None:
    got = normalise(scores, how)
    size = [abs(s) for s in scores]
    if max(size) == 0:
        assert not got.any()
        return
    divisor = {"mean": math.fsum(size) / len(size), "max": max(size), "sum": math.fsum(size)}[how]
    np.testing.assert_allclose(got, [s / divisor for s in scores], rtol=1e-9, atol=1e-300)
    assert all((got[i] <= got[j]) for i, a in enumerate(scores) for j, b in enumerate(scores) if a <= b)


def test_normalise_leaves_its_argument_alone() -> None:
    scores = np.array([1.0, 3.0])
    assert normalise(scores).tolist() == [0.5, 1.5]
    assert normalise(scores, None).tolist() == [1.0, 3.0]
    assert scores.tolist() == [1.0, 3.0]
    assert normalise([1e308, 1e308]).tolist() == [1.0, 1.0]
    with pytest.raises(GraphPruneError, match="'mean', 'max', 'sum' or None"):
        normalise(scores, "median")


def test_scaled_layers_are_equal_after_normalising() -> None:
    tensors = {"a": randn(5, 4), "b": randn(5, 4) * 1000}
    groups = [group([(name, 0, every(5), "out")], index=n) for n, name in enumerate("ab")]
    a, b = (score("l2", g, tensors) for g in groups)
    np.testing.assert_allclose(normalise(a), normalise(b), rtol=1e-5)
    # LAMP needs no normalising
    np.testing.assert_allclose(*(score("lamp", g, tensors) for g in groups), rtol=1e-5)


def test_heads_are_judged_by_all_their_weights() -> None:
    tensors = {"qkv": randn(12, 5)}
    positions = np.concatenate([blocks(2, 2) + 4 * part for part in range(3)], axis=1)  # q, k and v of a head
    got = score("l2", group([("qkv", 0, positions, "out")]), tensors)
    parts = tensors["qkv"].double().reshape(3, 2, 2, 5)
    np.testing.assert_allclose(got, parts.square().sum((0, 2, 3)).sqrt(), rtol=1e-6)
