from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune import GraphPruneError, Plan
from graphprune.plans.modules.bypass import Bypass
from graphprune.recovery.repair.checking import Check
from tests.layered_networks import Residual, networks


def test_one_call_removes_layers() -> None:
    model, x, _layers = networks()["stages"]
    plan = graphprune.plan(model, x, 0.4, granularity="layer")
    assert len(plan.layers) == 2 and not plan.empty and "left out" in str(plan)
    small = graphprune.prune(model, x, 0.4, granularity="layer")
    assert len(small.stage1) + len(small.stage2) == 4 and len(model.stage1) + len(model.stage2) == 6
    assert graphprune.count(small, x).macs < graphprune.count(model, x).macs
    report = graphprune.verify(model, small, plan, x)
    assert report.passed and {c.name for c in report.checks} >= {"bypass", "bypass, noise", "weights"}


@pytest.mark.parametrize("ratio, number", [(0.0, 0), (0.1, 1), (0.5, 3), (0.99, 5)])
def test_the_ratio_is_a_share_of_the_layers_that_can_go(ratio: float, number: int) -> None:
    model, x, _ = networks()["stages"]
    assert len(graphprune.plan(model, x, ratio, granularity="layer").layers) == number


def test_the_least_important_go_first() -> None:
    model, x, _ = networks()["decoder"]
    with torch.no_grad():
        for name in ("attention.o", "down"):
            part = model.layers[2].get_submodule(name)
            part.weight.zero_()
            part.bias.zero_()
    data = [(x, torch.randint(0, 20, x.shape))]
    for criterion in (None, "taylor", "loss"):
        plan = graphprune.plan(
            model, x, 0.25, granularity="layer", criterion=criterion, data=data,
            loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        )  # fmt: skip
        chosen = [b.module for b in plan.layers]
        assert chosen == ["layers.2"] or criterion == "loss"  # leaving out a harmful layer lowers the loss below that
    small = graphprune.prune(model, x, 0.25, granularity="layer")
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("limit", [0.9, 0.6, 0.4])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_budgets_are_met_and_no_layer_more_goes(what: str, limit: float) -> None:
    model, x, _ = networks()["stages"]
    small = graphprune.prune(model, x, granularity="layer", budget=graphprune.Budget(**{what: limit}))
    cost = {
        n: (c.macs if what == "macs" else c.parameters)
        for n, c in (("dense", graphprune.count(model, x)), ("small", graphprune.count(small, x)))
    }
    assert cost["small"] <= limit * cost["dense"]
    plan = graphprune.plan(model, x, granularity="layer", budget=graphprune.Budget(**{what: limit}))
    for block in plan.layers:
        rest = dataclasses.replace(plan, layers=tuple(b for b in plan.layers if b is not block))
        back = graphprune.count(rest.apply(model), x)
        assert (back.macs if what == "macs" else back.parameters) > limit * cost["dense"]


def test_impossible_budgets_and_unknown_ones() -> None:
    model, x, _ = networks()["stages"]
    with pytest.raises(GraphPruneError, match="macs cannot be brought"):
        graphprune.prune(model, x, granularity="layer", budget=graphprune.Budget(macs=0.01))
    with pytest.raises(GraphPruneError, match="macs cannot be brought"):
        graphprune.prune(model, x, granularity="layer", budget=graphprune.Budget(macs=0.5), max_ratio=0.2)


def test_ignored_layers_stay() -> None:
    model, x, _ = networks()["stages"]
    for ignore in (
        "stage1",
        "stage1.*",
        model.stage1,
        list(model.stage1),
        ["stage1.0.conv1", "stage1.1", "stage1.2"],
    ):
        plan = graphprune.plan(model, x, 0.99, granularity="layer", ignore=ignore)
        assert [b.module for b in plan.layers] == ["stage2.1", "stage2.2"]
    with pytest.raises(GraphPruneError, match="stage9"):
        graphprune.plan(model, x, 0.5, granularity="layer", ignore="stage9")


def test_a_list_that_cannot_shrink_gets_bypasses() -> None:
    model, x, _ = networks()["counted"]
    small = graphprune.prune(model, x, 0.5, granularity="layer")
    assert len(small.layers) == 4 and sum(isinstance(m, Bypass) for m in small.layers) == 2


def test_no_bypass_comes_first_where_layers_know_their_numbers() -> None:
    model, x, _ = networks()["counted"]
    plan = graphprune.plan(model, x, 0.99, granularity="layer")
    assert {b.module for b in plan.layers} == {"layers.1", "layers.2", "layers.3"}
    assert any("layers.0" in line and "cache" in line for line in plan.frozen)
    for layer in model.layers:
        del layer.attention.layer_idx
    assert len(graphprune.plan(model, x, 0.99, granularity="layer").layers) == 4


@pytest.mark.parametrize("when", ["when built", "when run"])
def test_a_scale_that_layers_take_from_their_place_stays_what_it_was(when: str, tmp_path: Path) -> None:
    """As GPT-2's scale_attn_by_inverse_layer_idx, whose number newer releases work out once and older ones each run."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(Scaled(i, when) for i in range(5)))

    model, x = build(), torch.randn(2, 3, 6)
    with torch.no_grad():
        for i in (1, 3):
            for parameter in model[i].inner.parameters():
                parameter.mul_(1e-3)
    plan = graphprune.plan(model, x, 0.4, granularity="layer")
    assert {b.module for b in plan.layers} == {"1", "3"}
    small = plan.apply(model)
    assert graphprune.verify(model, small, plan, x).passed
    expected = x
    for i in (0, 2, 4):
        expected = expected + model[i].inner(expected) / (i + 1)
    torch.testing.assert_close(small(x), expected)
    assert any(isinstance(m, Bypass) for m in small) == (when == "when run")  # those behind would move up
    graphprune.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(graphprune.load(tmp_path / "small.safetensors", build())(x), expected)


class Scaled(nn.Module):
    """A residual layer, scaled by its place."""

    def __init__(self, layer_idx: int, when: str) -> None:
        super().__init__()
        self.layer_idx, self.when, self.inner = layer_idx, when, nn.Linear(6, 6)
        self.scaling = 1 / (layer_idx + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scaling if self.when == "when built" else 1 / (self.layer_idx + 1)
        return x + self.inner(x) * scale


def test_what_cannot_go_at_all_is_named() -> None:
    model, x, _ = networks()["needed"]
    plan = graphprune.plan(model, x, 0.5, granularity="layer")
    assert plan.empty and all("layers." in line and "conv1" in line for line in plan.frozen)
    model, x, _ = networks()["branches"]
    plan = graphprune.plan(model, x, 0.5, granularity="layer")
    assert plan.empty and "no layer can be left out" in plan.frozen[0]
    assert graphprune.prune(model, x, 0.5, granularity="layer")(x).equal(model(x))


def test_plans_are_files(tmp_path: Path) -> None:
    model, x, _ = networks()["attributes"]
    plan = graphprune.plan(model, x, 0.7, granularity="layer")
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    bad = plan.to_dict()
    for change in ({"module": "nowhere"}, {"stream": -1}, {"stream": None}, {"form": -2}, {"module": ""}):
        data = {**bad, "layers": [{**bad["layers"][0], **change}]}
        with pytest.raises(GraphPruneError):
            Plan.from_dict(data)
    with pytest.raises(GraphPruneError, match="another model"):
        plan.apply(networks()["stages"][0])


def test_layers_then_channels() -> None:
    model, x, _ = networks()["stages"]
    both = graphprune.prune(graphprune.prune(model, x, 0.4, granularity="layer"), x, 0.5)
    assert graphprune.count(both, x).macs < 0.4 * graphprune.count(model, x).macs
    with pytest.raises(GraphPruneError, match="need a budget"):
        graphprune.prune(model, x, 0.5, granularity=["layer", "channels"])


def test_recovery_of_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Check, "passes", lambda self, surely=False: True)  # whether it helps is not asked here
    model, x, _ = networks()["stages"]
    data = torch.randn(16, 3, 6, 6)
    small = graphprune.prune(model, x, 0.4, granularity="layer", data=[data, data[:1]], recover="batchnorm")
    seen: list[torch.Tensor] = []
    norm = small.stage2[0].bn1
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3))))
    small(data)
    torch.testing.assert_close(norm.running_mean, seen[0], atol=1e-4, rtol=1e-4)


def test_a_wrong_network_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = networks()["stages"]
    plan = graphprune.plan(model, x, 0.4, granularity="layer")
    small = plan.apply(model)
    with torch.no_grad():
        small.head.bias.add_(1)
    report = graphprune.verify(model, small, plan, x)
    assert [c.name for c in report.checks if not c.passed] == ["bypass", "bypass, noise", "weights", "state"]
    monkeypatch.setattr(Plan, "apply", lambda self, m: copy.deepcopy(m))
    with pytest.raises(GraphPruneError, match="bypass"):
        graphprune.prune(model, x, 0.4, granularity="layer")


def test_nan_weights_are_an_error() -> None:
    model, x, _ = networks()["stages"]
    with torch.no_grad():
        model.stage1[1].conv1.weight.fill_(float("nan"))
    with pytest.raises(GraphPruneError, match="NaN"):
        graphprune.plan(model, x, 0.4, granularity="layer")


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int) -> None:
    """Whatever is found in a random chain of blocks, convolutions and norms, any part of it can go."""
    rng = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=rng))

    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
    for _ in range(4 + pick(4)):
        kinds = [
            Residual(6),
            nn.Conv2d(6, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Sequential(Residual(6), nn.Conv2d(6, 6, 3)),
        ]
        layers.append(kinds[pick(5)])
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 3, 20, 20)
    plan = graphprune.plan(model, x, 0.1 + 0.2 * pick(5), granularity="layer")
    small = plan.apply(model)
    assert (graphprune.verify(model, small, plan, x).passed and not plan.frozen) or not plan.layers
    rest = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for b in plan.layers for p in model.get_submodule(b.module).parameters()
    )
    assert sum(p.numel() for p in small.parameters()) == rest


def test_a_file_rebuilds_layers_kernels_and_channels(tmp_path: Path) -> None:
    for name in ("stages", "decoder", "counted", "attributes"):
        model, x, _ = networks()[name]
        small = graphprune.prune(model, x, 0.5, granularity="layer")
        if name in ("stages", "attributes"):
            small = graphprune.prune(graphprune.shrink_kernels(small, x, 0.3), x, 0.4)
        path = graphprune.save(small, tmp_path / f"{name}.safetensors")
        again = graphprune.load(path, lambda model=model: type(model)()).eval()
        assert torch.equal(again(x), small(x)), name
