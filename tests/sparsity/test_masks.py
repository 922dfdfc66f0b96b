from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, sparsity
from graphprune.sparsity.weights import find_weights

from .networks import NETWORKS, cnn, example, mlp, weight_normed

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def train(model: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {w.name: w.value.clone() for w in find_weights(model)}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_pruned_comes_back_and_the_rest_trains(name: str, optimiser: str) -> None:
    model, x = example(name)
    stepper = OPTIMISERS[optimiser](model.parameters())
    train(model, x, stepper)  # momentum of weights that are pruned next
    sparsity.magnitude(model, 0.6, "layer")
    before, held = values(model), sparsity.masks(model)
    assert held
    train(model, x, stepper)
    after = values(model)
    for key, mask in held.items():
        assert torch.equal(sparsity.masks(model)[key], mask)
        assert not after[key][~mask].any() and not torch.signbit(after[key][~mask]).any()
    # the optimiser made before goes on working (weight norm: masks do not replace its parameters either)
    assert all((after[key] != before[key]).any() for key in held)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_with_exactly_the_masked_weights(name: str) -> None:
    model, x = example(name)
    model.eval()
    reference = copy.deepcopy(model)
    dense = values(model)
    sparsity.magnitude(model, 0.5)
    held = sparsity.masks(model)
    for key in held:  # the slow way: ordinary parameters, multiplied once
        assert torch.equal(values(model)[key], torch.where(held[key], dense[key], torch.zeros(())))
    for weight in find_weights(reference):
        if weight.name in held:
            for site in weight.sites:
                if site.attribute in dict(site.module.named_parameters(recurse=False)):
                    getattr(site.module, site.attribute).data.mul_(held[weight.name])
                else:
                    torch.nn.utils.parametrize.remove_parametrizations(site.module, site.attribute)
                    getattr(site.module, site.attribute).data.mul_(held[weight.name])
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
        names = set(reference.state_dict())
        sparsity.make_permanent(model)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert set(model.state_dict()) == names and not sparsity.masks(model)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), reference.modules(), strict=True))


def test_pruned_values_are_zero_whatever_lies_behind_them() -> None:
    layer = nn.Linear(2, 2)
    sparsity.set_masks(layer, {"weight": torch.tensor([[True, False], [False, True]])})
    behind = layer.parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        behind.copy_(torch.tensor([[-1.0, torch.nan], [-torch.inf, 2.0]]))
    assert torch.equal(layer.weight, torch.tensor([[-1.0, 0.0], [0.0, 2.0]]))
    layer(torch.ones(1, 2)).sum().backward()
    assert torch.equal(behind.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_shared_weights_are_masked_everywhere_and_stay_shared() -> None:
    model, _ = example("tied")
    parameter = model.embedding.weight
    sparsity.magnitude(model, 0.5, "layer", parameters="head")
    assert set(sparsity.masks(model)) == {"embedding.weight"}
    assert torch.equal(model.embedding.weight, model.head.weight)
    assert int((model.head.weight == 0).sum()) == 48
    sparsity.magnitude(model, 0.75, "layer", parameters="embedding")
    assert torch.equal(model.embedding.weight, model.head.weight)
    sparsity.make_permanent(model)
    assert model.embedding.weight is parameter and model.head.weight is parameter
    assert int((parameter == 0).sum()) == 72


@pytest.mark.parametrize("build", [mlp, weight_normed])
def test_copies_are_independent(build: Callable[[], nn.Module]) -> None:
    # torch shares the class that holds the property between copies
    model = sparsity.magnitude(build(), 0.5)
    x = torch.randn(2, 12)
    expected = model(x)
    clone = copy.deepcopy(model)
    sparsity.make_permanent(clone)
    assert torch.equal(model(x), expected) and torch.equal(clone(x), expected)
    other = sparsity.magnitude(copy.deepcopy(model), 0.5, parameters=["*.bias"])
    assert torch.equal(model(x), expected) and isinstance(model[0].bias, nn.Parameter)
    sparsity.magnitude(other, 0.9)
    assert torch.equal(model(x), expected)


def test_identity_mode_memory_format_and_dtype_stay() -> None:
    model = cnn().to(memory_format=torch.channels_last).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    parameters = [id(p) for p in model.parameters()]
    sparsity.magnitude(model, 0.5)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    sparsity.make_permanent(model)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and not model[0].weight.requires_grad
    assert model[0].weight.dtype == torch.bfloat16


def test_masks_follow_their_model_and_its_state_dict() -> None:
    model = sparsity.magnitude(mlp(), 0.5).double()
    other = sparsity.magnitude(mlp(), 0.2).double()
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(values(model).values(), values(other).values(), strict=True))


def test_structured_pruning_takes_what_was_made_permanent() -> None:
    model = sparsity.magnitude(mlp(), 0.5, "layer").eval()
    x = torch.randn(4, 12)
    assert graphprune.plan(model, x, 0.5, round_to=1).empty
    small = graphprune.prune(sparsity.make_permanent(model), x, 0.5, round_to=1)
    assert small[0].weight.shape == (10, 12) and 0 < (small[0].weight == 0).sum() < 120


def test_masked_models_are_exported_and_counted(tmp_path: Path) -> None:
    model, x = sparsity.magnitude(cnn(), 0.5).eval(), torch.randn(1, 3, 6, 6)
    graphprune.export_onnx(model, x, tmp_path / "masked.onnx")  # with its parity check
    assert graphprune.count(model, x).macs == graphprune.count(cnn().eval(), x).macs


def test_set_masks_reads_names_and_refuses_others() -> None:
    model = mlp()
    before = values(model)
    mask = torch.rand(20, 12) < 0.5
    for wrong, message in (
        ({"0.weight": mask, "nothing": mask}, "no floating-point parameter 'nothing'"),
        ({"0.weight": mask.float()}, r"0.weight needs a boolean tensor of shape \(20, 12\), got torch.float32"),
        ({"0.weight": mask.T}, r"got torch.bool \(12, 20\)"),
        ({"0.weight": [1]}, "got list"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.set_masks(model, wrong)  # type: ignore[arg-type]
    assert not sparsity.masks(model)
    sparsity.set_masks(model, {"0.weight": mask})
    mask_before = mask.clone()
    mask.fill_(False)  # the caller's tensor is the caller's
    assert torch.equal(sparsity.masks(model)["0.weight"], mask_before)
    sparsity.set_masks(model, {"0.weight": ~mask})
    assert torch.equal(model[0].weight, before["0.weight"])


def test_a_module_that_cannot_be_parametrised_leaves_all_as_it_was() -> None:
    class Closed(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "parametrizations":
                raise TypeError("closed")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(4, 4), Closed(4, 4))
    kinds = [type(m) for m in model.modules()]
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(GraphPruneError, match="cannot be parametrised"):
        sparsity.magnitude(model, 0.5)
    found = model.state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[k], expected[k]) for k in expected)
    assert type(model[0]) is kinds[1]


def test_make_permanent_without_masks_says_so() -> None:
    with pytest.raises(GraphPruneError, match="no masks to make permanent"):
        sparsity.make_permanent(mlp())
