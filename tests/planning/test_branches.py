"""Branches left out of layers: `granularity="branch"`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.dependency.whole.branches import find_branches
from graphprune.importance.calibration import CalibrationData
from graphprune.importance.layers import layer_scores
from graphprune.plans.modules.bypass import Silence
from graphprune.plans.surgery import remove_layers
from graphprune.tracing.example import ExampleInput
from tests.dependency.whole.test_branches import Network
from tests.layered_networks import networks

PAIRS = (("mixer", "norm1"), ("mlp", "norm2"))
X, Y = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1)), torch.randint(0, 2, (7, 5))


def network(style: str = "pre-norm") -> Network:
    torch.manual_seed(0)
    return Network(style).eval()


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def scores(model: nn.Module, criterion: str, batch: int) -> list[float]:
    data = CalibrationData(list(zip(X.split(batch), Y.split(batch), strict=True)), ExampleInput.of(X), model)
    return layer_scores(model, find_branches(model, X[:1]), criterion, data, loss_fn)


@pytest.mark.parametrize("batch", [2, 7])
def test_scores_are_those_of_the_network_with_zeros_added(batch: int) -> None:
    model = network()
    names = [b.module for b in find_branches(model, X[:1])]
    with torch.no_grad():
        whole = model(X)
        rest = [model(X, frozenset([name])) for name in names]
        changes = [float((out - whole).square().sum() / whole.square().sum()) for out in rest]
        losses = [float(loss_fn(out, Y) - loss_fn(whole, Y)) for out in rest]
    assert scores(model, "output", batch) == pytest.approx(changes, rel=1e-4)
    assert scores(model, "loss", batch) == pytest.approx(losses, rel=1e-3, abs=1e-6)


def test_taylor_is_the_gradient_of_a_factor_of_the_branch() -> None:
    model = network().double()
    expected = []
    for block in find_branches(model, X[:1].double()):
        module, total = model.get_submodule(block.module), 0.0
        for i in range(len(X)):
            factor = torch.ones((), dtype=torch.float64, requires_grad=True)

            def scaled(module: nn.Module, args: object, out: object, g: Tensor = factor) -> object:
                return (out[0] * g, *out[1:]) if isinstance(out, tuple) else out * g  # type: ignore[operator]

            handle = module.register_forward_hook(scaled)
            total += abs(float(torch.autograd.grad(loss_fn(model(X[i : i + 1].double()), Y[i : i + 1]), factor)[0]))
            handle.remove()
        expected.append(total / len(X))
    data = CalibrationData([(X.double(), Y)], ExampleInput.of(X.double()), model)
    found = layer_scores(model, find_branches(model, X[:1].double()), "taylor", data, loss_fn)
    assert found == pytest.approx(expected) and len(set(found)) == 4


def test_one_call_leaves_out_what_changes_least(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.layers[1].mixer.tokens.weight.mul_(1e-3)
        model.layers[1].mixer.tokens.bias.mul_(1e-3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = graphprune.plan(model, X, 0.25, granularity="branch")
    assert [b.module for b in plan.layers] == ["layers.1.mixer"] and plan.layers[0].branch
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    small = graphprune.prune(model, X, 0.25, granularity="branch")
    assert isinstance(small.layers[1].mixer, Silence) and type(small) is Network
    assert small(X).equal(model(X, frozenset(["layers.1.mixer"])))
    report = graphprune.verify(model, small, plan, X)
    assert report.passed and {c.name for c in report.checks} >= {"bypass", "bypass, noise", "weights"}
    assert graphprune.count(small, X).macs < graphprune.count(model, X).macs
    small.train()
    small(X).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_budgets_ignored_ones_and_other_criteria() -> None:
    model = network()
    for limit in (0.8, 0.5):
        small = graphprune.prune(model, X, granularity="branch", budget=graphprune.Budget(macs=limit))
        assert graphprune.count(small, X).macs <= limit * graphprune.count(model, X).macs
    plan = graphprune.plan(model, X, 1.0 - 1e-9, granularity="branch", ignore="*.mixer", criterion="magnitude")
    assert {b.module for b in plan.layers} == {"layers.0.mlp", "layers.1.mlp"}
    with pytest.raises(GraphPruneError, match='use "output"'):
        graphprune.plan(model, X, 0.5, granularity="branch", criterion="block_influence")
    with pytest.raises(GraphPruneError, match="does not go with"):
        graphprune.plan(model, X, 0.5, granularity=["branch", "layer"])
    other, x, _ = networks()["chain"]
    assert "no branch can be left out" in graphprune.plan(other, x, 0.5, granularity="branch").frozen[0]


@pytest.mark.parametrize("style", ["pre-norm", "norm behind"])
def test_exported_and_saved(style: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small = graphprune.prune(network(style), X, 0.5, granularity="branch")
    report = graphprune.export_onnx(small, X, tmp_path / "small.onnx")
    assert report.max_relative_error is not None and report.max_relative_error < 1e-5
    graphprune.save(small, tmp_path / "small.safetensors")
    assert graphprune.load(tmp_path / "small.safetensors", network(style))(X).equal(small(X))


def test_a_norm_behind_goes_with_its_branch(tmp_path: Path) -> None:
    model = network("norm behind")
    plan = graphprune.plan(model, X, 0.99, granularity="branch", ignore="layers.0.norm2")
    names = [("layers.0.mixer", "layers.0.norm1"), *((f"layers.1.{a}", f"layers.1.{b}") for a, b in PAIRS)]
    assert [b.modules for b in plan.layers] == names
    assert "layers.1.mixer, layers.1.norm1: left out" in plan.summary()
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    data = plan.to_dict()
    for broken in ({"branch": False}, {"parts": [{**data["layers"][0], "branch": True}]}, {"parts": [{"module": "x"}]}):
        with pytest.raises(GraphPruneError, match="not a plan"):
            Plan.from_dict({**data, "layers": [{**data["layers"][0], **broken}]})
    with pytest.raises(GraphPruneError, match="'other', which it does not describe"):
        part = {**data["layers"][0]["parts"][0], "module": "other"}
        Plan.from_dict({**data, "layers": [{**data["layers"][0], "parts": [part]}]})
    small = plan.apply(model)
    assert graphprune.verify(model, small, plan, X).passed
    gone = frozenset(b.module for b in plan.layers)
    torch.testing.assert_close(small(X), model(X, gone))
    costs, rest = graphprune.count(model, X), graphprune.count(small, X)
    paths = tuple(f"{path}." for b in plan.layers for path in b.modules)
    inside = sum(p.numel() for n, p in model.named_parameters() if n.startswith(paths))
    assert costs.parameters - rest.parameters == inside
    found = scores(model, "magnitude", 7)
    parts = [model.layers[0].mixer.linear.weight, model.layers[0].mixer.tokens.weight]  # a norm has no such weight
    assert found[0] == pytest.approx(float(torch.cat([w.detach().flatten() for w in parts]).abs().mean()))


def test_what_counts_tokens_stays() -> None:
    model, x, _ = networks()["decoder"]
    plan = graphprune.plan(model, x, 0.99, granularity="branch", ignore="*.up")
    assert [b.module for b in plan.layers] == [f"layers.{i}.attention" for i in (1, 2, 3)]
    assert any("layers.0.attention" in line and "cache" in line for line in plan.frozen)


def test_what_is_no_decoder_counts_no_tokens() -> None:
    model, x, _ = networks()["decoder"]
    for layer in model.layers:  # type: ignore[union-attr]
        layer.attention.is_decoder = False
    plan = graphprune.plan(model, x, 0.99, granularity="branch", ignore="*.up")
    assert [b.module for b in plan.layers] == [f"layers.{i}.attention" for i in range(4)]
    assert not any("cache" in line for line in plan.frozen)


def test_layers_after_branches_leave_something_that_counts_tokens() -> None:
    model, x, _ = networks()["decoder"]
    (second,) = [b for b in find_branches(model, x) if b.module == "layers.1.attention"]
    small = remove_layers(model, [second])
    plan = graphprune.plan(small, x, 0.99, granularity="layer", ignore="layers.1")
    assert {b.module for b in plan.layers} == {"layers.2", "layers.3"}
    assert any("layers.0 cannot" in line and "cache" in line for line in plan.frozen)
    assert len(graphprune.plan(model, x, 0.99, granularity="layer", ignore="layers.1").layers) == 3
