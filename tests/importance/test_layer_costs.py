from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune import GraphPruneError
from graphprune.dependency.whole.blocks import find_blocks
from graphprune.importance import latency
from graphprune.importance.layers import layer_scores
from graphprune.tracing.example import ExampleInput
from tests.layered_networks import networks


def wide(widths: tuple[int, ...] = (6, 30, 12, 18)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, 4)) for w in widths)).eval()


def parameters(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def test_magnitude_is_the_mean_of_absolute_weights() -> None:
    model, x, _ = networks()["stages"]
    found = layer_scores(model, find_blocks(model, x), "magnitude", [], None)
    for block, score in zip(find_blocks(model, x), found, strict=True):
        values = [
            abs(v)
            for name, p in model.get_submodule(block.module).named_parameters()
            if name.endswith("weight") and "conv" in name
            for v in p.flatten().tolist()
        ]
        assert score == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert len(set(found)) == len(found)


def test_the_weakest_weights_go_first_without_data() -> None:
    model, x, _ = networks()["decoder"]
    with torch.no_grad():
        for parameter in model.layers[2].parameters():
            parameter.mul_(0.5)
        model.layers[1].norm1.weight.zero_()  # norms do not count
    plan = graphprune.plan(model, x, 0.25, granularity="layer", criterion="magnitude")
    assert [b.module for b in plan.layers] == ["layers.2"]


def test_a_function_says_what_a_network_costs() -> None:
    model, x = wide(), torch.randn(2, 4)
    seen: list[float] = []

    def cost(network: nn.Module) -> float:
        seen.append(parameters(network))
        return seen[-1]

    plan = graphprune.plan(model, x, 0.5, granularity="layer", criterion=cost)
    assert [b.module for b in plan.layers] == ["1", "3"]
    sizes = [parameters(layer) for layer in model]
    assert seen == [parameters(model), *(parameters(model) - size for size in sizes)]
    assert graphprune.prune(model, x, 0.5, granularity="layer", criterion=cost)(x).equal(model[2](model[0](x)))


def test_latency_is_measured_network_by_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring replaced by one that counts parameters: what it is given, and what is made of its answers."""
    model, x = wide(), torch.randn(2, 4)
    before = copy.deepcopy(model.state_dict())
    given: list[float] = []

    def measure(models: Any, example: ExampleInput) -> list[float]:
        given.extend(parameters(m) for m in models)
        return [1.0 + number / 1000 for number in given]

    monkeypatch.setattr(latency, "milliseconds", measure)
    scores = layer_scores(model, find_blocks(model, x), "latency", [], None, ExampleInput.of(x))
    assert scores == pytest.approx([-parameters(layer) / 1000 for layer in model])
    assert given[0] == parameters(model) and len(given) == 5
    plan = graphprune.plan(model, x, granularity="layer", criterion="latency", budget=graphprune.Budget(macs=0.6))
    assert not plan.empty
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("criterion", ["latency", parameters])
def test_a_layer_without_which_nothing_runs_goes_last(criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "milliseconds", lambda models, example: [parameters(m) for m in models])
    model, x, _ = networks()["needed"]
    assert layer_scores(model, find_blocks(model, x), criterion, [], None, ExampleInput.of(x)) == [math.inf] * 2
    plan = graphprune.plan(model, x, 0.5, granularity="layer", criterion=criterion)
    assert plan.empty and all("conv1" in line for line in plan.frozen)


def test_onnx_runtime_measures_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x = torch.randn(2, 4)
    found = latency.milliseconds(iter([wide(), wide((3,))]), ExampleInput.of(x))
    assert len(found) == 2 and all(math.isfinite(ms) and ms > 0 for ms in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, "much", None])
def test_functions_that_return_no_cost(value: Any) -> None:
    model, x = wide(), torch.randn(2, 4)
    with pytest.raises(GraphPruneError, match="what it costs"):
        graphprune.plan(model, x, 0.5, granularity="layer", criterion=lambda network: value)


def test_unknown_names_say_what_there_is() -> None:
    model, x = wide(), torch.randn(2, 4)
    with pytest.raises(GraphPruneError, match="'magnitude', 'latency', or a function"):
        graphprune.plan(model, x, 0.5, granularity="layer", criterion="l2")
    with pytest.raises(GraphPruneError, match='"magnitude" needs none'):
        graphprune.plan(model, x, 0.5, granularity="layer", criterion="taylor")
