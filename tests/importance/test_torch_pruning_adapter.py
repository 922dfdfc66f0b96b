"""torch_pruning's importance objects on our groups against the same objects on that library's own groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from graphprune.dependency.groups import Group
from graphprune.errors import GraphPruneError
from graphprune.importance import BatchNormLink, ImportanceContext, normalise, resolve_criterion

from .conv_models import CASES, Normed
from .reference import blocks, every, group, randn

importance = tp.importance


OBJECTS: dict[str, Callable[[], Any]] = {
    "magnitude": importance.MagnitudeImportance,
    "magnitude l1 with bias": lambda: importance.GroupMagnitudeImportance(p=1, bias=True, normalizer=None),
    "magnitude max": lambda: importance.GroupMagnitudeImportance(group_reduction="max", normalizer="max"),
    "magnitude prod": lambda: importance.GroupMagnitudeImportance(group_reduction="prod", normalizer="sum"),
    "magnitude first": lambda: importance.GroupMagnitudeImportance(group_reduction="first"),
    "magnitude gaussian": lambda: importance.GroupMagnitudeImportance(normalizer="gaussian"),
    "lamp": importance.LAMPImportance,
    "fpgm": importance.FPGMImportance,
    "taylor": importance.GroupTaylorImportance,
    "taylor multivariable": lambda: importance.TaylorImportance(multivariable=True, bias=True),
    "hessian": importance.GroupHessianImportance,
}


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no score for group")
        yield


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def backward(model: nn.Module, size: int = 6) -> None:
    model.zero_grad()
    model(randn(2, 3, size, size) if not isinstance(model, Normed) else randn(2, 3, 4, 4)).square().sum().backward()


def ours(scorer: Any, model: nn.Module, g: Group, **options: Any) -> np.ndarray:
    return resolve_criterion(scorer)(ImportanceContext(model, dict(model.named_parameters()), **options), g)


def theirs(scorer: Any, model: nn.Module, root: str, count: int) -> np.ndarray:
    size = 4 if isinstance(model, Normed) else 6
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=randn(1, 3, size, size))
    layer = model.get_submodule(root)
    handler = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    scores = scorer(graph.get_pruning_group(layer, handler, idxs=list(range(count))))
    return scores.double().numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTS)
def test_same_numbers_as_the_library_itself(case: str, name: str) -> None:
    make, root, count, members = CASES[case]
    model = build(make)
    backward(model)
    expected = theirs(OBJECTS[name](), model, root, count)
    np.testing.assert_allclose(ours(OBJECTS[name](), model, group(members)), expected[:count], rtol=1e-5)


@pytest.mark.parametrize("case", ["plain", "residual", "depthwise"])
def test_bn_scale_object(case: str) -> None:
    make, root, count, members = CASES[case]
    model = build(make)
    expected = theirs(importance.BNScaleImportance(), model, root, count)
    np.testing.assert_allclose(ours(importance.BNScaleImportance(), model, group(members)), expected, rtol=1e-5)


def test_hessian_accumulated_over_samples() -> None:
    make, root, count, members = CASES["residual"]
    results = []
    for score in (lambda s, m: theirs(s, m, root, count), lambda s, m: ours(s, m, group(members))):
        model, scorer = build(make), importance.GroupHessianImportance()
        for sample in range(3):
            model.zero_grad()
            model(randn(1, 3, 6, 6, seed=sample)).square().sum().backward()
            scorer.accumulate_grad(model)
        results.append(score(scorer, model))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def test_the_models_parameters_are_seen_and_not_the_effective_tensors() -> None:
    make, _, _, members = CASES["plain"]
    model = build(make)
    backward(model)
    g = group(members)
    expected = ours(importance.GroupTaylorImportance(), model, g)
    folded = ImportanceContext(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    np.testing.assert_array_equal(resolve_criterion(importance.GroupTaylorImportance())(folded, g), expected)


def test_grouped_convolution_counts_its_slices_once_per_group() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "grouped": nn.Conv2d(8, 4, 3, groups=2)})
    positions = np.array([[u, u + 4] for u in range(4)])  # channel u of both groups
    g = group([("conv.weight", 0, positions, "out"), ("grouped.weight", 1, every(4), "in")])
    got = ours(importance.GroupMagnitudeImportance(normalizer=None, group_reduction="sum"), model, g)
    out, into = (model[name].weight.detach().double().square() for name in ("conv", "grouped"))
    expected = [float(out[u].sum() + out[u + 4].sum() + 2 * into[:, u].sum()) for u in range(4)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_grouped_transposed_convolution_numbers_its_inputs_through() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "up": nn.ConvTranspose2d(8, 4, 2, groups=2)})
    g = group([("conv.weight", 0, every(8), "out"), ("up.weight", 0, every(8), "in")])
    got = ours(importance.GroupMagnitudeImportance(normalizer=None, group_reduction="sum"), model, g)
    expected = sum(model[name].weight.detach().double().square().sum((1, 2, 3)) for name in ("conv", "up"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_whole_groups_of_a_transposed_convolution() -> None:
    """Its weight cannot be indexed by output channels there, so that layer stays out; its consumer does not."""
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(8, 4, 2, groups=2), "conv": nn.Conv2d(4, 3, 1)})
    g = group([("up.bias", 0, blocks(2, 2), "vector"), ("conv.weight", 1, blocks(2, 2), "in")])
    got = ours(importance.GroupMagnitudeImportance(normalizer=None), model, g)
    squares = model["conv"].weight.detach().double().square()
    np.testing.assert_allclose(got, squares.reshape(3, 2, 2).sum((0, 2)), rtol=1e-5)


@pytest.mark.parametrize("name", ["magnitude", "taylor", "fpgm"])
def test_heads_sum_over_their_channels(name: str) -> None:
    """Units of three rows each, in an order that no sorting may disturb, are sums of single channels."""
    model = nn.ModuleDict({"qkv": nn.Linear(5, 12), "proj": nn.Linear(12, 5)})
    model["proj"](model["qkv"](randn(3, 5))).square().sum().backward()
    order = np.random.default_rng(1).permutation(12).reshape(4, 3)
    single = group([("qkv.weight", 0, every(12), "out"), ("proj.weight", 1, every(12), "in")])
    heads = group([("qkv.weight", 0, order, "out"), ("proj.weight", 1, order, "in")])
    expected = ours(OBJECTS[name](), model, single)[order].sum(1)
    np.testing.assert_allclose(ours(OBJECTS[name](), model, heads), expected, rtol=1e-5)


@pytest.mark.parametrize("scorer", [importance.MagnitudeImportance, importance.RandomImportance])
def test_members_of_unequal_width(scorer: Callable[[], Any]) -> None:
    """Grouped-query attention: a unit is one key and value head and the two query heads that read them."""
    model = nn.ModuleDict({"q": nn.Linear(5, 12), "k": nn.Linear(5, 6), "o": nn.Linear(12, 5)})
    g = group(
        [
            ("q.weight", 0, blocks(3, 4), "out"),
            ("k.weight", 0, blocks(3, 2), "out"),
            ("o.weight", 1, blocks(3, 4), "in"),
        ]
    )
    got = ours(scorer(), model, g)
    assert got.shape == (3,)
    if scorer is importance.MagnitudeImportance:
        q, k, o = (model[name].weight.detach().double().square() for name in "qko")
        total = q.reshape(3, 4, 5).sum((1, 2)) + k.reshape(3, 2, 5).sum((1, 2)) + o.reshape(5, 3, 4).sum((0, 2))
        np.testing.assert_allclose(got / got.mean(), total / total.mean(), rtol=1e-5)


def test_random_follows_the_seed_and_leaves_the_global_one_alone() -> None:
    make, _, _, members = CASES["plain"]
    model, g = build(make), group(members)
    before = torch.get_rng_state()
    first = ours(importance.RandomImportance(), model, g, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert np.array_equal(first, ours(importance.RandomImportance(), model, g, seed=1))
    assert not np.array_equal(first, ours(importance.RandomImportance(), model, g, seed=2))


def test_shared_weights_count_in_every_layer_that_holds_them() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    nn.init.zeros_(model["a"].bias)
    g = group([("a.weight", 0, every(4), "out"), ("a.bias", 0, every(4), "vector"), ("b.bias", 0, every(4), "vector")])
    got = ours(importance.GroupMagnitudeImportance(bias=True, normalizer=None, group_reduction="sum"), model, g)
    weight, bias = model["a"].weight.detach().double(), model["b"].bias.detach().double()
    np.testing.assert_allclose(got, 2 * weight.square().sum(1) + bias.square(), rtol=1e-5)


def test_a_folded_bn_is_found_through_its_link() -> None:
    make, _, _, members = CASES["plain"]
    model = build(make)
    without = group([m for m in members if not m[0].startswith("bn1")])
    link = {"conv1.weight": BatchNormLink(model.bn1.weight.detach(), module="bn1")}
    expected = ours(importance.MagnitudeImportance(), model, group(members))
    np.testing.assert_allclose(ours(importance.MagnitudeImportance(), model, without, bn=link), expected, rtol=1e-6)


# What has no score, and what goes wrong


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(randn(4, 3, 1, 1))
        self.attention = nn.MultiheadAttention(6, 2)


def test_a_group_the_object_cannot_judge_is_ranked_by_l2_and_says_so() -> None:
    model = Bare()
    g = group([("filters", 0, every(4), "out")], index=5, name="filters axis 0")
    with pytest.warns(UserWarning, match=r"MagnitudeImportance has no score for group 5 \(filters axis 0\)"):
        got = ours(importance.MagnitudeImportance(), model, g)
    norms = model.filters.detach().double().flatten(1).norm(dim=1).numpy()
    np.testing.assert_allclose(got, normalise(norms), rtol=1e-6)


class CountsParameters(importance.Importance):
    """An object of the user's own that reads bare parameters and the axis that would be cut."""

    def __call__(self, group: Any) -> Tensor:
        scores = torch.zeros(len(group[0].idxs))
        for dep, idxs in group:
            values = dep.layer.detach().movedim(dep.target.pruning_dim, 0).flatten(1).abs().sum(1)[idxs]
            scores.scatter_add_(0, torch.tensor(group[0].root_idxs), values)
        return scores


def test_bare_parameters_are_handed_over_as_such() -> None:
    model = Bare()
    g = group([("attention.in_proj_weight", 0, blocks(2, 9)[::-1], "out")])
    got = ours(CountsParameters(), model, g)
    expected = model.attention.in_proj_weight.detach().double().abs().reshape(2, 9, 6).sum((1, 2)).flip(0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


class Recorder(importance.Importance):
    """Judges units as such, and remembers what it was shown."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.seen: list[tuple[Any, str, list[int], list[int]]] = []

    def __call__(self, group: Any) -> Tensor:
        for item in group:
            assert item.dep.target.module is item.dep.layer and item.dep.handler == item.dep.pruning_fn
            self.seen.append((item.dep.layer, item.dep.handler.__self__.__class__.__name__, item.idxs, item.root_idxs))
        return torch.arange(self.units)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = nn.Parameter(torch.ones(4))


def test_what_an_object_is_shown() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.GroupNorm(2, 4),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "prelu": nn.PReLU(4),
            "embed": nn.Embedding(4, 4),
            "plane": nn.LayerNorm((4, 3)),
            "line": nn.LayerNorm(4),
            "scaled": Scaled(),
            "up": nn.ConvTranspose2d(4, 2, 1, groups=2),
            "fc": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    model.register_buffer("mask", torch.ones(4))
    names = ["norm.bias", "instance.weight", "prelu.weight", "embed.weight"]
    names += ["plane.weight", "line.bias", "scaled.scale"]
    halves = blocks(2, 2)[::-1]
    g = group(
        [
            *((name, 0, halves, "vector") for name in names),
            ("embed.weight", 1, halves, "other"),
            ("up.bias", 0, every(2), "vector"),
            ("mask", 0, halves, "vector"),
            ("attention.in_proj_weight", 1, halves, "in"),
            ("fc.weight", 1, halves, "in"),
            ("fc.bias", 0, halves, "vector"),
            ("fc.weight", 0, halves, "out"),
        ]
    )
    recorder = Recorder(2)
    assert ours(recorder, model, g).tolist() == [0, 1]  # one score per unit is taken as it is
    expected = [
        (model["fc"], "LinearPruner"),  # the producer leads
        (model["norm"], "GroupNormPruner"),
        (model["instance"], "InstanceNormPruner"),
        (model["prelu"], "PReLUPruner"),
        (model["embed"].weight, "ParameterPruner"),
        (model["plane"].weight, "ParameterPruner"),
        (model["line"], "LayernormPruner"),
        (model["scaled"].scale, "ParameterPruner"),
        (model["embed"], "EmbeddingPruner"),
        (model["attention"].in_proj_weight, "ParameterPruner"),
        (model["fc"], "LinearPruner"),
    ]
    assert [pruner for _, pruner, _, _ in recorder.seen] == [pruner for _, pruner in expected]
    assert all(shown[0] is layer for shown, (layer, _) in zip(recorder.seen, expected, strict=True))
    assert all(idxs == [0, 1, 2, 3] and root == [2, 3, 0, 1] for _, _, idxs, root in recorder.seen)


@pytest.mark.parametrize("name", ["taylor", "hessian"])
def test_gradients_that_are_missing_are_asked_for(name: str) -> None:
    make, _, _, members = CASES["plain"]
    with pytest.raises(GraphPruneError, match=r"needs gradients, and '\w+\.weight' has none: run loss\.backward\(\)"):
        ours(OBJECTS[name](), build(make), group(members))


def test_frozen_layers_do_not_stop_taylor() -> None:
    make, _, _, members = CASES["plain"]
    model = build(make)
    model.conv1.requires_grad_(False)
    backward(model)
    got = ours(importance.GroupTaylorImportance(normalizer=None), model, group(members))
    weight = model.conv2.weight
    expected = (weight * weight.grad).detach().double().abs().sum((0, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_object_that_does_not_reduce_is_refused() -> None:
    make, _, _, members = CASES["plain"]
    scorer = importance.GroupMagnitudeImportance(group_reduction=None, normalizer=None)
    with pytest.raises(GraphPruneError, match=r"returned shape \(3, 8\) for group 0 .*one score for each of 8"):
        ours(scorer, build(make), group(members))


def test_nan_weights_are_named() -> None:
    make, _, _, members = CASES["plain"]
    model = build(make)
    with torch.no_grad():
        model.conv1.weight[2, 0, 0, 0] = float("nan")
    with pytest.raises(GraphPruneError, match=r"'torch_pruning\.MagnitudeImportance' gave .* in 'conv1\.weight'"):
        ours(importance.MagnitudeImportance(), model, group(members))


def test_meta_models_have_nothing_to_judge() -> None:
    make, _, _, members = CASES["plain"]
    with pytest.raises(GraphPruneError, match="meta device"):
        ours(importance.MagnitudeImportance(), build(make).to("meta"), group(members))


def test_classes_are_asked_for_an_instance() -> None:
    with pytest.raises(GraphPruneError, match=r"pass an instance, MagnitudeImportance\(\)"):
        resolve_criterion(importance.MagnitudeImportance)


def test_names_and_scale() -> None:
    found = resolve_criterion(importance.LAMPImportance())
    assert found.name == "torch_pruning.LAMPImportance" and found.comparable
