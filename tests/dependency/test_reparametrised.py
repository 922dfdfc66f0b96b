"""Weights that are computed: plain twins, and what the sources become when the weight loses channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from graphprune.dependency.reparametrised import forms_in, plain, reparametrised
from graphprune.support.cutting import cut_tensor
from tests.reparametrised_networks import SPECTRAL_NORMS, Drawn, Exponential, Gained, LowRank, perceptron, weight_norms

NORMS = {**weight_norms(), **{f"spectral, {name}": norm for name, norm in SPECTRAL_NORMS.items()}}


@pytest.mark.parametrize("how", NORMS)
def test_a_plain_twin_computes_the_same_and_shares_what_is_not_computed(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[how](nn.Conv1d(4, 6, 3)), nn.ReLU(), nn.ConvTranspose1d(6, 5, 3)).eval()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 4, 9)
    bare = plain(model)
    assert bare is not model and plain(bare) is bare
    assert type(bare[0]) is nn.Conv1d and sorted(dict(bare[0].named_parameters())) == ["bias", "weight"]
    assert bare[0].bias is model[0].bias and bare[2].weight is model[2].weight
    torch.testing.assert_close(bare(x), model(x), rtol=1e-6, atol=1e-6)
    assert [w.name for w in reparametrised(bare[0])] == ["0.weight"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_model_without_computed_weights_and_one_whose_weights_are_drawn_are_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert plain(model) is model
    model = perceptron(Drawn())
    assert plain(model) is model


def test_sources_that_two_weights_share_are_left_alone() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 4)))
    model[1].weight_v = model[0].weight_v
    assert sorted(forms_in(plain(model))) == ["2.weight"]


@pytest.mark.parametrize("how", NORMS)
@pytest.mark.parametrize("axes", [{0: [1, 3]}, {1: [0, 2]}, {0: [0], 1: [1, 3]}])
def test_the_new_sources_compute_what_is_left(how: str, axes: dict[int, list[int]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[how](nn.Conv1d(4, 6, 3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    form = forms_in(plain(model))["0.weight"]
    wanted = form.settled(cut_tensor(form.value(), axes))
    assert form.axes(form.cuts(axes)) == axes
    found = form.tensors(wanted, axes)
    shapes = {n: tuple(cut_tensor(t, form.cuts(axes).get(n, {})).shape) for n, t in form.sources().items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    names = list(form.sources())
    if how.startswith("spectral"):
        o, u, v = (found[name] for name in names)
        matrix = o.flatten(1)
        again = o / (u @ matrix @ v)
        assert abs(float(torch.linalg.matrix_norm(again.flatten(1), 2)) - 1) < 1e-5
    else:
        again = torch._weight_norm(found[names[0]], found[names[1]], form.dim)
        assert torch.equal(found[names[0]], cut_tensor(form.v, axes))  # directions stay
    torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_takes_any_weight(dim: int | None) -> None:
    """Other directions, other signs, nothing at all, and v without length."""
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6), dim=dim))
    form = forms_in(plain(model))["0.weight"]
    wanted = torch.randn(6, 5)
    if dim is not None:
        wanted[0], wanted[:, 0] = 0, 0
    for weight in (wanted, -form.value(), form.value() * 3, torch.zeros(6, 5)):
        found = form.tensors(weight, {})
        v, g = (found[name] for name in form.sources())
        torch.testing.assert_close(torch._weight_norm(v, g, form.dim), weight, rtol=1e-5, atol=1e-6)


def test_the_largest_singular_value_of_large_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(200, 150)))
    form = forms_in(plain(model))["0.weight"]
    weight = torch.randn(150, 200)
    torch.testing.assert_close(form.settled(weight), weight / torch.linalg.matrix_norm(weight, 2))


@pytest.mark.parametrize("step", [Exponential(), LowRank(16, 8), Gained(16, 8)])
def test_other_parametrisations_are_followed(step: nn.Module) -> None:
    torch.manual_seed(0)
    form = forms_in(plain(perceptron(step)))["2.weight"]
    assert form.held() == ()
    axes = {0: [0, 5, 7], 1: [2]}
    chain = perceptron(copy.deepcopy(step))[2]
    assert parametrize.is_parametrized(chain) and form.axes(form.cuts(axes)) == axes
    found = form.tensors(form.value(), axes)
    original = found["parametrizations.weight.original"]
    small = copy.deepcopy(step)
    for name, tensor in small.named_parameters():
        tensor.data = found[f"parametrizations.weight.0.{name}"].detach()
    for name, _ in list(small.named_buffers()):
        setattr(small, name, found[f"parametrizations.weight.0.{name}"])
    torch.testing.assert_close(small(original.detach()), cut_tensor(form.value(), axes))
