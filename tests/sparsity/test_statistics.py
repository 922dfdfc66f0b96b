from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from graphprune import GraphPruneError, sparsity


def build() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*first, *second, nn.Linear(12 * 16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for norm in (model[1], model[4], model[8]):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                out.append(x.transpose(0, 1).flatten(1))
    return out


def test_norms_put_out_what_the_dense_ones_do_on_average() -> None:
    dense, x = build(), torch.randn(64, 3, 6, 6)
    model = sparsity.magnitude(copy.deepcopy(dense), 0.7).train()
    weights = [p.clone() for p in model.parameters()]
    pairs = zip(outputs(dense, x), outputs(model, x), strict=True)
    off = [float((a.mean(1) - b.mean(1)).abs().max()) for a, b in pairs]
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    assert sparsity.match_statistics(model, dense, x) is model
    assert all(m.training for m in model.modules()) and not dense.training
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for a, b, before in zip(outputs(dense, x), outputs(model.eval(), x), off, strict=True):
        torch.testing.assert_close(a.mean(1), b.mean(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.std(1), b.std(1), atol=1e-4, rtol=1e-4)
        assert float((a.mean(1) - b.mean(1)).abs().max()) < before


def test_equal_models_stay_and_dead_channels_do_no_harm() -> None:
    dense, x = build(), torch.randn(64, 3, 6, 6)
    same = sparsity.match_statistics(copy.deepcopy(dense), dense, (x,))
    torch.testing.assert_close(same(x), dense(x))
    dead = copy.deepcopy(dense)
    mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    mask[2] = False
    sparsity.match_statistics(sparsity.set_masks(dead, {"0.weight": mask}), dense, x)
    assert dead(x).isfinite().all()


def test_norms_that_run_twice_stay() -> None:
    norm = nn.BatchNorm1d(4)
    dense = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm).eval()
    model = sparsity.magnitude(copy.deepcopy(dense), 0.5)
    sparsity.match_statistics(model, dense, torch.randn(32, 4))
    assert torch.equal(model[1].running_mean, norm.running_mean) and torch.equal(model[1].running_var, norm.running_var)


def test_errors_change_nothing() -> None:
    dense = build()
    model = sparsity.magnitude(copy.deepcopy(dense), 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(GraphPruneError, match="the batch norms differ"):
        sparsity.match_statistics(model, dense[:4], torch.randn(2, 3, 6, 6))
    model.add_module("11", nn.Linear(99, 1))
    with pytest.raises(GraphPruneError, match="a model failed: RuntimeError"):
        sparsity.match_statistics(model, dense, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(not m._forward_pre_hooks for m in [*model.modules(), *dense.modules()])
