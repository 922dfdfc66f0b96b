from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune import GraphPruneError
from graphprune.dependency.whole.blocks import find_blocks
from graphprune.importance.calibration import CalibrationData
from graphprune.importance.layers import check_layer_criterion, layer_scores
from graphprune.tracing.example import ExampleInput
from tests.layered_networks import Decoder, networks

CLASSES = {"stages": 5, "decoder": 20}


def task(name: str, samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model, _example, _ = networks()[name]
    torch.manual_seed(1)
    x = torch.randn(samples, 3, 6, 6) if name == "stages" else torch.randint(0, 20, (samples, 5))
    return (
        model.double() if name == "stages" else model,
        x.double() if name == "stages" else x,
        torch.randint(0, CLASSES[name], (samples,) if name == "stages" else (samples, 5)),
    )


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def scores(model: nn.Module, x: Tensor, y: Tensor, name: str, batch: int) -> list[float]:
    data = CalibrationData(list(zip(x.split(batch), y.split(batch), strict=True)), ExampleInput.of(x), model)
    return layer_scores(model, find_blocks(model, x[:1]), name, data, loss_fn)


class Gated(nn.Module):
    """The layer with a gate, as a module of its own: x + gate (f(x) - x)."""

    def __init__(self, layer: nn.Module, gate: Tensor) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate
        self.kind = getattr(layer, "kind", None)

    def forward(self, x: Tensor, *rest: object, **options: object) -> object:
        y = self.layer(x, *rest, **options)
        if isinstance(y, tuple):
            return (x + self.gate * (y[0] - x), *y[1:])
        return x + self.gate * (y - x)


def gated(model: nn.Module, path: str, value: float) -> tuple[nn.Module, Tensor]:
    out = copy.deepcopy(model)
    owner, _, name = path.rpartition(".")
    gate = torch.tensor(value, dtype=next(model.parameters()).dtype, requires_grad=True)
    setattr(out.get_submodule(owner), name, Gated(out.get_submodule(path), gate))
    return out, gate


@pytest.mark.parametrize("batch", [1, 4, 6])
@pytest.mark.parametrize("name", ["stages", "decoder"])
def test_loss_is_that_of_the_network_without_the_layer(name: str, batch: int) -> None:
    model, x, y = task(name)
    whole = float(loss_fn(model(x), y))
    paths = [b.module for b in find_blocks(model, x[:1])]
    expected = [float(loss_fn(gated(model, path, 0.0)[0](x), y)) - whole for path in paths]
    assert scores(model, x, y, "loss", batch) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 6])
@pytest.mark.parametrize("name", ["stages", "decoder"])
def test_taylor_is_the_gradient_of_a_gate_sample_by_sample(name: str, batch: int) -> None:
    model, x, y = task(name)
    expected = []
    for block in find_blocks(model, x[:1]):
        total = 0.0
        for i in range(len(x)):
            network, gate = gated(model, block.module, 1.0)
            total += abs(float(torch.autograd.grad(loss_fn(network(x[i : i + 1]), y[i : i + 1]), gate)[0]))
        expected.append(total / len(x))
    assert len(set(expected)) == len(expected)  # a hook that shared a late-bound name would give every layer one score
    assert scores(model, x, y, "taylor", batch) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("batch", [2, 6])
def test_influence_is_one_minus_the_cosine(batch: int) -> None:
    model, x, y = task("decoder")
    assert isinstance(model, Decoder)
    hidden, expected = model.embed(x), []
    mask = torch.full((5, 5), -1e4).triu(1)
    for layer in model.layers:
        new = layer(hidden, mask if layer.kind == "full" else mask * 0.5)[0]
        away = [
            1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(hidden.flatten(0, 1), new.flatten(0, 1), strict=True)
        ]
        expected.append(sum(away) / len(away))
        hidden = new
    assert scores(model, x, y, "block_influence", batch) == pytest.approx(expected, abs=1e-5)


def test_the_model_is_as_before() -> None:
    model, x, y = task("stages")
    model.train()
    model.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("taylor", "loss", "block_influence"):
        scores(model, x, y, name, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert not model.head.weight.requires_grad and model.head.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_errors() -> None:
    with pytest.raises(GraphPruneError, match="block_influence"):
        check_layer_criterion("l2", None)
    with pytest.raises(GraphPruneError, match="data="):
        check_layer_criterion("taylor", None)
    model, x, y = task("stages")
    blocks = find_blocks(model, x[:1])
    with pytest.raises(GraphPruneError, match="no targets"):
        layer_scores(model, blocks, "loss", CalibrationData([x], ExampleInput.of(x), model), loss_fn)
    data = CalibrationData([(x, y)], ExampleInput.of(x), model)
    with pytest.raises(GraphPruneError, match="loss_fn failed on batch 0"):
        layer_scores(model, blocks, "loss", data, lambda a, b: a.nonsense)
    with pytest.raises(GraphPruneError, match="scalar"):
        layer_scores(model, blocks, "loss", data, lambda a, b: a)
    with pytest.raises(GraphPruneError, match="gradients"):
        layer_scores(model, blocks, "taylor", data, lambda a, b: a.detach().sum())
