"""The readings that criteria are made of, against loops over single elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.importance import BatchNormLink, ImportanceContext
from graphprune.importance import context as context_module

from . import reference
from .reference import blocks, every, group, randn


@st.composite
def placed(draw: st.DrawFn) -> tuple[torch.Tensor, int, np.ndarray]:
    """A tensor of 1-4 axes, one of them, and positions of some units of k slices each, in any order."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    k = draw(st.integers(1, 3))
    units = draw(st.integers(1, 5))
    shape[axis] = units * k + draw(st.integers(0, 3))
    order = draw(st.permutations(range(shape[axis])))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    tensor = randn(*shape, seed=draw(st.integers(0, 1000)), dtype=dtype)
    if draw(st.booleans()):
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)  # strides in another order
    return tensor, axis, np.array(order[: units * k], dtype=np.int64).reshape(units, k)


@settings(max_examples=120)
@given(placed(), st.sampled_from([1, 2, 3, 0.5]))
def test_norm_is_the_norm_of_each_units_elements(case: tuple[torch.Tensor, int, np.ndarray], p: float) -> None:
    tensor, axis, positions = case
    g = group([("w", axis, positions, "out")])
    got = ImportanceContext(nn.Module(), {"w": tensor}).norms(g, p)[0]
    expected = [reference.norm(tensor, axis, unit, p) for unit in positions]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.dtype == np.float64


@settings(max_examples=120)
@given(placed())
def test_matrix_holds_each_units_elements(case: tuple[torch.Tensor, int, np.ndarray]) -> None:
    tensor, axis, positions = case
    g = group([("w", axis, positions, "out")])
    got = ImportanceContext(nn.Module(), {"w": tensor}).weights(g)[0]
    assert got.dtype == (torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    for row, unit in zip(got, positions, strict=True):
        assert row.tolist() == reference.unit_values(tensor, axis, unit)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_norm_over_several_blocks(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    monkeypatch.setitem(context_module._BLOCK, "cpu", 40)
    tensor = randn(7, 6, 5, 2)
    g = group([("w", axis, every(tensor.shape[axis]), "out")])
    expected = [reference.norm(tensor, axis, [u], 2) for u in range(tensor.shape[axis])]
    np.testing.assert_allclose(ImportanceContext(nn.Module(), {"w": tensor}).norms(g, 2)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("length", [8192, 8193, 9216, 16411, 25088])
def test_norms_of_long_rows(length: int) -> None:
    """16411 is a prime: there are no equal parts."""
    tensor = randn(3, length)
    got = ImportanceContext(nn.Module(), {"w": tensor}).norms(group([("w", 0, every(3), "out")]), 2)[0]
    np.testing.assert_allclose(got, tensor.double().square().sum(1).sqrt().numpy(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25, 3e37])
@pytest.mark.parametrize("axis", [0, 1])
def test_squares_beyond_float32_keep_their_order(scale: float, axis: int) -> None:
    tensor = randn(4, 4, 3) * scale
    g = group([("w", axis, every(4), "out")])
    got = ImportanceContext(nn.Module(), {"w": tensor}).norms(g, 2)[0]
    expected = [math.hypot(*reference.unit_values(tensor, axis, [u])) for u in range(4)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_complex_weights_count_by_absolute_value_and_as_pairs() -> None:
    tensor = torch.complex(randn(3, 4, seed=1), randn(3, 4, seed=2)).conj()
    g = group([("w", 0, every(3), "out")])
    context = ImportanceContext(nn.Module(), {"w": tensor})
    np.testing.assert_allclose(context.norms(g, 1)[0], [reference.norm(tensor, 0, [u], 1) for u in range(3)], rtol=1e-6)
    matrix = context.weights(g)[0]
    assert matrix.shape == (3, 8)
    np.testing.assert_allclose(matrix.norm(dim=1).double(), context.norms(g, 2)[0], rtol=1e-6)


def test_a_tensor_is_reduced_once_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []
    original = context_module._power_sums

    def counted(tensor: torch.Tensor, axis: int, p: float) -> context_module.Floats:
        calls.append((axis, p))
        return original(tensor, axis, p)

    monkeypatch.setattr(context_module, "_power_sums", counted)
    tensor = randn(6, 4)
    context = ImportanceContext(nn.Module(), {"w": tensor})
    first, second = (group([("w", 0, every(6)[part], "out")]) for part in (slice(0, 3), slice(3, 6)))
    got = np.concatenate([context.norms(first, 2)[0], context.norms(second, 2)[0]])
    np.testing.assert_allclose(got, tensor.double().norm(dim=1), rtol=1e-6)
    assert calls == [(0, 2.0)]
    context.norms(first, 1)
    assert calls == [(0, 2.0), (0, 1.0)]


def test_members_are_those_with_the_role_and_a_floating_value() -> None:
    tensors = {"a": randn(3, 2), "b": randn(3), "steps": torch.zeros(3, dtype=torch.long)}
    g = group(
        [
            ("a", 0, every(3), "out"),
            ("b", 0, every(3), "vector"),
            ("steps", 0, every(3), "vector"),
            ("folded_away", 0, every(3), "vector"),
        ]
    )
    context = ImportanceContext(nn.Module(), tensors)
    assert [m.parameter for m in context.members(g)] == ["a"]
    assert [m.parameter for m in context.members(g, ("vector", "out"))] == ["a", "b"]
    assert [w.shape for w in context.weights(g, ("vector",))] == [(3, 1)]


def test_parameters_are_read_detached_and_unchanged() -> None:
    parameter = nn.Parameter(randn(3, 2))
    before = parameter.detach().clone()
    context = ImportanceContext(nn.Module(), {"w": parameter})
    g = group([("w", 0, every(3), "out")])
    assert not context.weights(g)[0].requires_grad
    context.norms(g, 2)
    assert torch.equal(parameter, before) and parameter.requires_grad and parameter.grad is None


def test_no_copy_of_a_weight_whose_units_are_its_rows() -> None:
    tensor = randn(4, 6)
    g = group([("w", 0, blocks(2, 2), "out")])
    assert ImportanceContext(nn.Module(), {"w": tensor}).weights(g)[0].data_ptr() == tensor.data_ptr()


def test_meta_tensors_have_no_value() -> None:
    context = ImportanceContext(nn.Module(), {"layer.weight": torch.empty(3, 2, device="meta")})
    g = group([("layer.weight", 0, every(3), "out")])
    for read in (lambda: context.norms(g, 2), lambda: context.weights(g)):
        with pytest.raises(GraphPruneError, match=r"'layer\.weight' is on the meta device"):
            read()


def test_nonfinite_names_the_tensors() -> None:
    tensors = {"good": randn(2, 2), "bad": torch.tensor([1.0, math.nan]), "worse": torch.tensor([math.inf, 0.0])}
    g = group([(name, 0, every(2), "out") for name in tensors])
    assert ImportanceContext(nn.Module(), tensors).nonfinite(g) == ["bad", "worse"]


@pytest.mark.parametrize("p", [0, -1, math.inf, math.nan])
def test_norm_rejects_what_is_no_norm(p: float) -> None:
    with pytest.raises(GraphPruneError, match="p must be a finite number"):
        ImportanceContext(nn.Module(), {"w": randn(2, 2)}).norms(group([("w", 0, every(2), "out")]), p)


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_seed_must_be_a_natural_number(seed: object) -> None:
    with pytest.raises(GraphPruneError, match="seed"):
        ImportanceContext(nn.Module(), {}, seed=seed)


def test_generator_depends_on_seed_and_group_alone() -> None:
    g0, g1 = (group([("w", 0, every(2), "out")], index=n) for n in (0, 1))
    draws = {
        (seed, g.index): tuple(ImportanceContext(nn.Module(), {}, seed=seed).generator(g).random(4))
        for seed in (0, 1, 2**32)
        for g in (g0, g1)
    }
    assert len(set(draws.values())) == 6
    context = ImportanceContext(nn.Module(), {}, seed=1)
    context.generator(g0).random(100)
    assert tuple(context.generator(g1).random(4)) == draws[1, 1]


# BatchNorm scales


class FrozenNorm(nn.Module):
    """What detectors use: BatchNorm with buffers only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, randn(count, seed=len(name)))


def test_bn_scales_are_the_models_own() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 6, 3), "bn": nn.BatchNorm2d(6), "frozen": FrozenNorm(6), "group": nn.GroupNorm(2, 6)}
    )
    gamma = nn.init.normal_(model["bn"].weight).detach().clone()
    frozen = model["frozen"].weight
    # folded: the effective scale is one, the trained one counts
    tensors = {"conv.weight": randn(6, 2, 3, 3), "bn.weight": torch.ones(6), "group.weight": randn(6)}
    members = [(f"{name}.weight", 0, blocks(3, 2), "vector") for name in ("conv", "bn", "frozen", "group")]
    context = ImportanceContext(model, tensors)
    got = context.bn_scales(group(members))
    assert len(got) == 2
    for scales, values in zip(got, (gamma, frozen), strict=True):
        expected = [(abs(float(values[2 * u])) + abs(float(values[2 * u + 1]))) / 2 for u in range(3)]
        np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert context.mean_bn_scale == pytest.approx(float(torch.cat([gamma, frozen]).abs().double().mean()))


def test_bn_scales_of_folded_models_come_through_links() -> None:
    gamma, other = randn(4, seed=1), randn(4, seed=2)
    links = {
        "conv.weight": BatchNormLink(gamma),
        "conv.bias": BatchNormLink(gamma),
        "up.weight": BatchNormLink(other, axis=1),
    }
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "up": nn.ConvTranspose2d(4, 4, 1)})
    tensors = dict(model.named_parameters())
    context = ImportanceContext(model, tensors, bn=links)
    members = [("conv.weight", 0, every(4), "out"), ("conv.bias", 0, every(4), "vector")]
    got = context.bn_scales(group([*members, ("up.weight", 0, every(4), "in")]))
    assert len(got) == 1  # once for weight and bias; the scale of `up` is on its other axis
    np.testing.assert_allclose(got[0], gamma.abs(), rtol=1e-6)
    np.testing.assert_allclose(context.bn_scales(group([("up.weight", 1, every(4), "out")]))[0], other.abs(), rtol=1e-6)


def test_bn_scale_without_values_is_taken_from_the_given_tensors() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(3))
    g = group([("0.weight", 0, every(3), "vector")])
    gamma = torch.tensor([-1.0, 2.0, 3.0])
    context = ImportanceContext(model, {"0.weight": gamma})
    assert context.bn_scales(g)[0].tolist() == [1.0, 2.0, 3.0]
    assert context.mean_bn_scale == 2.0
    with pytest.raises(GraphPruneError, match=r"'0\.weight' is on the meta device"):
        ImportanceContext(model, {}).bn_scales(g)


def test_no_batchnorm_no_scale() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False), nn.InstanceNorm2d(2, affine=True))
    context = ImportanceContext(model, dict(model.named_parameters()))
    assert context.mean_bn_scale is None
    assert context.bn_scales(group([("0.weight", 0, every(2), "out"), ("2.weight", 0, every(2), "vector")])) == []


def test_layers_finds_every_holder_of_a_shared_tensor() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    context = ImportanceContext(model, {})
    embed, head = model["embed"], model["head"]
    for name in ("embed.weight", "head.weight"):
        assert context.layers(name) == (("embed", embed, "weight"), ("head", head, "weight"))
    assert context.layers("head.bias") == (("head", head, "bias"),)
    assert context.layers("nowhere.weight") == ()
