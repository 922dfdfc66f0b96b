"""A pruned copy keeps everything of its model but the removed slices; a failure leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graphprune
from graphprune import GraphPruneError
from graphprune.support import cutting
from graphprune.support.cutting import cut_tensor
from tests import oracles
from tests.networks.registry import settle


@settings(max_examples=50)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_cut_tensor_leaves_what_numpy_deletes_to(data: st.DataObject, shape: list[int]) -> None:
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    axes = {
        axis: sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
        for axis, n in enumerate(shape)
        if data.draw(st.booleans())
    }
    expected = tensor.numpy()
    for axis, indices in axes.items():
        expected = np.delete(expected, np.asarray(indices, np.int64), axis)
    assert np.array_equal(cut_tensor(tensor, axes).numpy(), expected)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 99), run=st.integers(1, 4), pieces=st.integers(2, 6), taps=st.sampled_from([(), (1, 1), (3,)])
)
def test_large_matrices_lose_pieces_as_small_ones_lose_indices(
    seed: int, run: int, pieces: int, taps: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 7)), run * pieces, *taps)
    tensor = torch.randn(shape)
    gone = rng.choice(pieces, int(rng.integers(1, pieces)), replace=False)
    columns = sorted(int(c) for p in gone for c in range(p * run, (p + 1) * run))
    rows = sorted(rng.choice(shape[0], int(rng.integers(1, shape[0])), replace=False).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_LARGE", 1)
        patch.setattr(cutting, "_PIECE", 1)
        found = cut_tensor(tensor, {1: columns, 0: rows})
    assert np.array_equal(found.numpy(), np.delete(np.delete(tensor.numpy(), rows, 0), columns, 1))
    assert found.is_contiguous()


def net() -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1))
    settle(model)
    return model.eval(), torch.randn(2, 3, 8, 8)


class Tied(nn.Module):
    """Words in and words out through one table, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.table(x))) + self.table(x))


def test_tied_weights_stay_tied_and_optimisers_see_one() -> None:
    model, x = Tied().eval(), torch.randint(0, 11, (2, 5))
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    assert small.out.weight is small.table.weight and small.out.weight.shape == (11, 4)
    assert len(list(small.parameters())) == len(list(model.parameters())) == 3
    assert (small.table.embedding_dim, small.out.in_features, small.middle.in_features) == (4, 4, 4)
    assert not oracles.parameters_match_plan(model, small, plan.removed)


@pytest.mark.parametrize("fold_bn", [False, True])
def test_frozen_parameters_stay_frozen_and_the_others_trainable(fold_bn: bool) -> None:
    model, x = net()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    small = graphprune.prune(model, x, 0.5, fold_bn=fold_bn)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == flags[name] and parameter.is_leaf and parameter.grad is None
    small(x).sum().backward()
    assert {n for n, p in small.named_parameters() if p.grad is None} == {"0.weight", "3.bias"}


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_is_kept(dims: int, fold_bn: bool) -> None:
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(conv(4, 8, 3), norm(8), conv(8, 6, 3)).eval().to(memory_format=layout)
    x = torch.randn(2, 4, *[8] * dims).to(memory_format=layout)
    small = graphprune.prune(model, x, 0.5, fold_bn=fold_bn)
    for layer in (small[0], small[2]):
        assert layer.weight.is_contiguous(memory_format=layout) and not layer.weight.is_contiguous()
    assert small(x).is_contiguous(memory_format=layout)
    plain = graphprune.prune(copy.deepcopy(model).to(memory_format=torch.contiguous_format), x, 0.5, fold_bn=fold_bn)
    assert all(p.is_contiguous() for p in plain.parameters())


class Remember:
    """A hook that can be copied."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.shapes.append(tuple(output.shape))


def test_hooks_are_copied_and_see_the_pruned_sizes() -> None:
    model, x = net()
    hook = Remember()
    model[3].register_forward_hook(hook)
    small = graphprune.prune(model, x, 0.5, verify=False)
    (copied,) = small[3]._forward_hooks.values()
    assert copied is not hook
    copied.shapes.clear()
    small(x)
    assert copied.shapes == [(2, 3, 4, 4)]


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_stays_and_computes_the_weights_that_were_there(dim: int) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8), dim=dim), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    plan = graphprune.plan(model, x, 0.5)
    small = plan.apply(model)
    assert torch.nn.utils.parametrize.is_parametrized(small[0], "weight")
    rows = list(plan.removed["2.weight"][1])
    kept = [i for i in range(8) if i not in rows]
    assert len(rows) == 4 and small[0].weight.shape[0] == len(kept)
    assert oracles.relative_error(small[0].weight, model[0].weight[kept]) < 1e-12
    assert oracles.relative_error(small(x), oracles.zero_reference(model, plan.removed)(x)) < 1e-12


class Sized(nn.Module):
    """Sizes and channel-wise buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes, self.note, self.eps = 8, {"hidden": (8, 1)}, "8 channels", 8
        self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.register_buffer("shift", torch.rand(8), persistent=False)
        self.register_buffer("steps", torch.tensor(7))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * self.scale.view(1, self.width, 1, 1)
        y = y + self.shift.reshape(1, *self.sizes["hidden"], 1)
        return self.outer(torch.relu(y))


def test_user_attributes_and_buffers_follow_and_what_only_looks_like_a_size_stays() -> None:
    model, x = Sized().eval(), torch.randn(2, 3, 4, 4)
    plan = graphprune.plan(model, x, 0.25, round_to=1)
    small = plan.apply(model)
    assert (small.width, small.sizes, small.note, small.eps) == (6, {"hidden": (6, 1)}, "8 channels", 8)
    assert model.width == 8 and model.sizes == {"hidden": (8, 1)}
    assert type(small.width) is int and type(small.sizes["hidden"]) is tuple
    assert small.scale.shape == small.shift.shape == (6,) and small.steps == 7
    assert set(small.state_dict()) == set(model.state_dict())  # what was not saved is not saved now
    assert small.unused.weight.shape == (8, 8)
    assert not oracles.parameters_match_plan(model, small, plan.removed)
    assert oracles.relative_error(small(x), oracles.zero_reference(model, plan.removed).float()(x)) < 1e-5


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "conv": (nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), (2, 3, 5), {"0.out_channels": 4, "1.num_features": 4}),
    "transposed": (nn.ConvTranspose1d(3, 8, 1), nn.PReLU(8), (2, 3, 5), {"0.out_channels": 4, "1.num_parameters": 4}),
    "linear": (nn.Linear(3, 8), nn.LayerNorm(8), (2, 3), {"0.out_features": 4, "1.normalized_shape": (4,)}),
    "rms": (nn.Linear(3, 8), nn.RMSNorm(8), (2, 3), {"0.out_features": 4, "1.normalized_shape": (4,)}),
    "group": (nn.Conv1d(3, 8, 1), nn.GroupNorm(2, 8), (2, 3, 5), {"0.out_channels": 4, "1.num_channels": 4}),
    "instance": (nn.Conv1d(3, 8, 1), nn.InstanceNorm1d(8, affine=True), (2, 3, 5), {"1.num_features": 4}),
    "unaffine": (nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8, affine=False), (2, 3, 5), {"1.num_features": 4}),
    "depthwise": (nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8), (2, 3, 5), {"1.groups": 4, "1.in_channels": 4}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_attributes_of_torch_nn_agree_with_the_tensors(case: str) -> None:
    first, second, shape, expected = copy.deepcopy(LAYERS[case])
    last = nn.Linear(8, 2) if len(shape) == 2 else nn.Conv1d(8, 2, 1)
    small = graphprune.prune(nn.Sequential(first, second, last).eval(), torch.randn(shape), 0.5, fold_bn=False)
    for name, value in expected.items():
        path, _, attribute = name.partition(".")
        assert getattr(small[int(path)], attribute) == value, name
    assert str(small[2].weight.shape[1]) in repr(small[2])


def test_bilinear() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 6)
            self.joint, self.out = nn.Bilinear(8, 6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.joint(self.a(x), self.b(x)))

    joint = graphprune.prune(Pair(), torch.randn(2, 3), 0.5).joint
    assert (joint.in1_features, joint.in2_features, joint.out_features) == (4, 3, 2) == (*joint.weight.shape[1:], 2)


# -- all or nothing


def broken(plan: graphprune.Plan, how: str) -> graphprune.Plan:
    """The plan with a mistake that shows only while it is carried out."""
    if how == "attribute":
        change = dataclasses.replace(plan.attributes[0], name="no_such_size")
        return dataclasses.replace(plan, attributes=(*plan.attributes, change))
    if how == "module":
        change = dataclasses.replace(plan.attributes[0], module="nowhere")
        return dataclasses.replace(plan, attributes=(*plan.attributes, change))
    return dataclasses.replace(plan, removed={**plan.removed, "outer.weight": {1: (99,)}})


@pytest.mark.parametrize("how", ["attribute", "module", "index"])
def test_a_failure_in_the_middle_leaves_the_model_bit_identical(how: str) -> None:
    model, x = Sized().train(), torch.randn(2, 3, 4, 4)
    plan = graphprune.plan(model, x, 0.5)
    before, random = oracles.snapshot(model), torch.get_rng_state()
    with pytest.raises(GraphPruneError):
        broken(plan, how).apply(model)
    assert not oracles.differences(before, oracles.snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    plan.apply(model)  # and it can still be pruned
    assert not oracles.differences(before, oracles.snapshot(model))


def test_a_model_that_cannot_be_copied_is_named_and_left_alone() -> None:
    class Uncopyable(Sized):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("one of a kind")

    model, x = Uncopyable().eval(), torch.randn(2, 3, 4, 4)
    before = oracles.snapshot(model)
    with pytest.raises(GraphPruneError, match="one of a kind"):
        graphprune.prune(model, x, 0.5)
    assert not oracles.differences(before, oracles.snapshot(model))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "has no 1.weight"),
        (lambda: nn.Sequential(*[*net()[0]][:4], nn.Conv2d(6, 3, 1)), r"4\.weight has shape \(3, 6, 1, 1\)"),
        (lambda: nn.Sequential(*net()[0], nn.Linear(2, 2)), r"knows no 5\.weight"),
    ],
)
def test_a_plan_for_another_model_is_refused(other: Any, what: str) -> None:
    model, x = net()
    plan, wrong = graphprune.plan(model, x, 0.5), other()
    before = oracles.snapshot(wrong)
    with pytest.raises(GraphPruneError, match=f"another model.*{what}"):
        plan.apply(wrong)
    assert not oracles.differences(before, oracles.snapshot(wrong))
    with pytest.raises(GraphPruneError, match="another model"):
        plan.apply(plan.apply(model))  # it is carried out already


@pytest.mark.parametrize("fold_bn", [False, True])
def test_pruning_twice_is_pruning_what_is_left(fold_bn: bool) -> None:
    model, x = net()
    first = graphprune.plan(model, x, 0.5, fold_bn=fold_bn, round_to=1)
    once = first.apply(model)
    second = graphprune.plan(once, x, 0.5, fold_bn=fold_bn, round_to=1)
    twice = second.apply(once)
    assert [m.out_channels for m in twice.modules() if isinstance(m, nn.Conv2d)] == [2, 1, 2]  # of 3: 1.5 go, that is 2
    # a channel that goes in the second round is one that stayed in the first
    left = [i for i in range(8) if i not in first.removed["3.weight"][1]]
    kept = [left[i] for i in range(4) if i not in second.removed["3.weight"][1]]
    rows = [i for i in range(6) if i not in first.removed["4.weight"][1]]
    rows = [rows[i] for i in range(3) if i not in second.removed["4.weight"][1]]
    assert torch.equal(twice[3].weight, model[3].weight[rows][:, kept])
    assert graphprune.verify(once, twice, second, x).passed
