from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from graphprune import GraphPruneError, sparsity


def build() -> nn.Module:
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, bias=False), nn.BatchNorm2d(12)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 6))
    model[3].running_mean.uniform_(-0.3, 0.3)
    model[3].running_var.uniform_(0.5, 1.5)
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


def slow_fit(layer: nn.Linear, mask: Tensor, x: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """One output at a time, by stacking the rows that pull towards the old weights below the data."""
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    pull = (ridge * x.double().square().sum(0).mean()).sqrt()
    for out in range(weight.shape[0]):
        kept = mask[out].nonzero()[:, 0]
        n = len(kept)
        rows = torch.cat([x.double()[:, kept], torch.ones(len(x), 1).double()], 1)
        below = torch.cat([torch.eye(n).double() * pull, torch.zeros(n, 1).double()], 1)
        right = torch.cat([wanted.double()[:, out], weight[out, kept] * pull])
        found = torch.linalg.lstsq(torch.cat([rows, below]), right[:, None], driver="gelsd").solution[:, 0]
        weight[out] = 0
        weight[out, kept] = found[:-1]
        bias[out] = found[-1]
    return weight, bias


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.8])
def test_one_layer_equals_a_fit_output_by_output(ridge: float, level: float) -> None:
    dense, x = nn.Sequential(nn.Linear(12, 7)), torch.randn(100, 12) @ torch.randn(12, 12)
    model = sparsity.magnitude(copy.deepcopy(dense), level)
    mask = sparsity.masks(model)["0.weight"]
    start = nn.Linear(12, 7)
    start.load_state_dict({"weight": model[0].weight.detach(), "bias": model[0].bias.detach()})
    with torch.no_grad():
        weight, bias = slow_fit(start, mask, x, dense(x), ridge)
    data = [x[:40], (x[40:], None), x[::8]]  # the last batch is held
    assert sparsity.reconstruct(model, dense, x[:2], data, ridge=ridge) is model
    torch.testing.assert_close(model[0].weight.double(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model[0].bias.double(), bias, atol=1e-4, rtol=1e-4)


def test_what_other_inputs_know_is_recovered_exactly() -> None:
    dense = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval()
    x = torch.randn(40, 4, 6, 6)
    x[:, 2] = 2 * x[:, 0] + 0.5 * x[:, 1]
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[:4, 2] = False
    model = sparsity.set_masks(copy.deepcopy(dense), {"0.weight": mask})
    assert error(model, dense, x) > 1e-3
    sparsity.reconstruct(model, dense, x[:1], x, ridge=1e-9)
    assert error(model, dense, x) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_masks_hold_the_error_falls_and_nothing_else_changes(seed: int) -> None:
    torch.manual_seed(seed)
    dense, x = build(), torch.randn(200, 4, 6, 6)
    model = sparsity.magnitude(copy.deepcopy(dense), 0.6).train()
    masks, before, untouched = sparsity.masks(model), error(copy.deepcopy(model).eval(), dense, x), state(dense)
    names = set(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    sparsity.reconstruct(model, dense, x[:2], x)
    assert all(m.training for m in model.modules()) and not dense.training
    assert set(model.state_dict()) == names and {id(p) for p in model.parameters()} == parameters
    assert all(torch.equal(v, untouched[k]) for k, v in dense.state_dict().items())
    for name, mask in masks.items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(sparsity.masks(model)[name], mask) and not weight[~mask].any()
    assert error(model.eval(), dense, x) < 0.5 * before
    sparsity.make_permanent(model)
    assert error(model, dense, x) < 0.5 * before


def test_layers_it_cannot_fit_stay() -> None:
    grouped, normed = nn.ConvTranspose2d(3, 3, 2, groups=3), weight_norm(nn.Linear(27, 5))
    dense = nn.Sequential(grouped, nn.Flatten(), normed, nn.Linear(5, 3))
    x = torch.randn(64, 3, 2, 2)
    model = sparsity.magnitude(copy.deepcopy(dense), 0.5, "layer")
    before = {i: model[i].weight.detach().clone() for i in (0, 2, 3)}
    sparsity.reconstruct(model, dense, x, x)
    assert torch.equal(model[0].weight, before[0]) and torch.equal(model[2].weight, before[2])
    assert not torch.equal(model[3].weight, before[3])


def test_errors_name_what_is_wrong_and_change_nothing() -> None:
    dense, x = build(), torch.randn(16, 4, 6, 6)
    model = sparsity.magnitude(copy.deepcopy(dense), 0.5)
    before = state(model)
    other = build()
    other[6] = nn.Linear(12 * 16, 7)
    with pytest.raises(GraphPruneError, match=r"reconstruct: 6\."):
        sparsity.reconstruct(model, other, x, x)
    with pytest.raises(GraphPruneError, match="ridge"):
        sparsity.reconstruct(model, dense, x, x, ridge=-1)
    with pytest.raises(GraphPruneError, match="no masks"):
        sparsity.reconstruct(copy.deepcopy(dense), dense, x, x)
    with pytest.raises(GraphPruneError, match="data"):
        sparsity.reconstruct(model, dense, x, [])
    with pytest.raises(GraphPruneError, match="data"):
        sparsity.reconstruct(model, dense, x, iter([x]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
