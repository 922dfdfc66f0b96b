"""Advice: its numbers made again by hand, and its choice on networks where the right one is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune import Advice, GraphPruneError, sparsity
from graphprune.workflows.diagnosis import Option

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def mlp(width: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    return nn.Sequential(*layers).eval()


def half_dead() -> nn.Sequential:
    """Every second hidden unit passes nothing on."""
    net = mlp(32)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[::2] = 0
            layer.bias[::2] = 0
    return net


def mostly_tiny() -> nn.Sequential:
    """Nine of ten weights hardly matter, scattered over all units."""
    net = mlp()
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            rank = layer.weight.abs().flatten().argsort().argsort().view_as(layer.weight)
            layer.weight.mul_(torch.where(rank < 0.9 * layer.weight.numel(), 1e-5, 1.0))
    return net


def option(advice: Advice, method: str, *amount: float) -> Option:
    (found,) = [o for o in advice.options if o.method == method and o.amount == amount]
    return found


def explained(dense: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    wanted = [row for x in batches for row in dense(x).tolist()]
    found = [row for x in batches for row in other(x).tolist()]
    lost = total = 0.0
    for column in range(3):
        mean = sum(row[column] for row in wanted) / len(wanted)
        total += sum((row[column] - mean) ** 2 for row in wanted)
        lost += sum((a[column] - b[column]) ** 2 for a, b in zip(wanted, found, strict=True))
    return 1 - lost / total


def stored(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_numbers_are_those_of_networks_and_files_made_by_hand(tmp_path: Path) -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    advice = graphprune.advise(net, X, "size")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()) and not sparsity.masks(net)
    small = graphprune.prune(net, X, 0.5)
    found = option(advice, "channels", 0.5)
    counts = [sum(p.numel() for p in m.parameters()) for m in (net, small)]
    assert found.parameters == counts[0] / counts[1] and found.bytes == stored(net) / stored(small)
    assert found.macs == graphprune.count(net, X).macs / graphprune.count(small, X).macs
    assert found.fidelity == pytest.approx(explained(net, small, [X]), abs=1e-6)
    for base, method, amount in ((net, "masks", (0.8,)), (small, "channels and masks", (0.5, 0.8))):
        masked = sparsity.magnitude(copy.deepcopy(base), 0.8)
        found = option(advice, method, *amount)
        assert found.bytes == stored(net) / sparsity.save(masked, tmp_path / "x").stat().st_size
        left = sum(int((p != 0).sum()) for p in sparsity.make_permanent(masked).parameters())
        assert found.parameters == counts[0] / left
        assert found.fidelity == pytest.approx(explained(net, masked, [X]), abs=1e-6)
        assert (found.macs == 1) == (method == "masks")


def test_with_data_channels_are_repaired_and_scored() -> None:
    net = mlp()
    data = [torch.randn(30, 6) for _ in range(3)]
    held_out = [(torch.randn(50, 6), torch.randint(0, 3, (50,)))]
    advice = graphprune.advise(net, X, data=data, evaluate=held_out, tolerance=0.5)
    found = option(advice, "channels", 0.3)
    plan = graphprune.plan(net, X, 0.3, criterion="reconstruction", data=data)
    small = graphprune.recover(net, plan, X, data).model
    assert found.fidelity == pytest.approx(explained(net, small, data), abs=1e-6)
    assert found.score == graphprune.Evaluation(held_out)(small) and advice.metric == "top-1 accuracy"
    assert advice.recommended is option(advice, "channels", 0.7)  # all lose less than the tolerance
    strict = graphprune.advise(net, X, data=data, evaluate=lambda m: 1.0 if m is net else 0.0)
    best = max(strict.options, key=lambda o: o.fidelity or 0)
    assert strict.recommended == best and "check its accuracy" in str(strict)


def test_dead_channels_are_found_and_masks_where_weights_are_tiny() -> None:
    speed = graphprune.advise(half_dead(), X, "speed").recommended
    assert speed is not None and (speed.method, speed.amount) == ("channels", (0.5,))
    assert speed.fidelity == pytest.approx(1)
    size = graphprune.advise(mostly_tiny(), X, "size").recommended
    assert size is not None and size.method.endswith("masks") and size.amount[-1] >= 0.8
    both = graphprune.advise(half_dead(), X, "resources").recommended
    assert both is not None and both.macs > 1 and both.method.startswith("channels")


def test_layers_that_do_nothing_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.down(self.up(x).relu())
            return out

    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(10)), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for i in range(10):
            net[i].down.weight.mul_(1e-4 if i in (1, 4, 5, 6, 8) else 3)
            net[i].down.bias.zero_()
    advice = graphprune.advise(net, X)
    found = advice.recommended
    assert found is not None and (found.method, found.amount) == ("layers", (0.5,)) and found.fidelity is not None
    plan = graphprune.plan(net, X, 0.5, granularity="layer")
    assert {block.module for block in plan.layers} == {"1", "4", "5", "6", "8"}
    small = plan.apply(net)
    assert found.macs == graphprune.count(net, X).macs / graphprune.count(small, X).macs
    assert found.fidelity == pytest.approx(explained(net, small, [X]), abs=1e-6)


def test_training_allows_more() -> None:
    net = mlp()
    data = [torch.randn(60, 6)]
    without, later = (graphprune.advise(net, X, data=data, finetune=f).recommended for f in (False, True))
    assert without is not None and later is not None and later.macs >= without.macs
    advice = graphprune.advise(net, X, finetune=True)
    assert advice.recommended is not None and advice.recommended.amount == (0.5,)
    assert "graphprune.pipeline(model, example_input, data, 0.5" in str(advice) and "usual" in str(advice)
    assert json.loads(json.dumps(advice.to_dict()))["recommended"]["amount"] == [0.5]


def test_the_call_that_is_recommended_runs() -> None:
    model, example_input, data = mlp(), X, [torch.randn(60, 6)]
    for goal, given in (("speed", None), ("speed", data), ("resources", data)):
        advice = graphprune.advise(model, example_input, goal, data=given)
        assert advice.options
        for found in advice.options:
            names: dict[str, Any] = {"graphprune": graphprune, "example_input": example_input, "data": data}
            names["model"] = copy.deepcopy(model)
            call = found.call.split("; graphprune.sparsity.save")[0]
            if call.startswith("graphprune.prune("):
                call = f"small = {call}"
            exec(call, names)
            made = names.get("small", names["model"])
            before, after = (graphprune.count(net, example_input) for net in (model, made))
            plain = graphprune.sparsity.make_permanent(made) if "masks" in found.method else made
            left = sum(int(p.count_nonzero()) for p in plain.parameters())
            assert found.macs == pytest.approx(before.macs / after.macs)
            assert found.parameters == pytest.approx(before.parameters / left)


def test_speed_is_measured_on_request() -> None:
    advice = graphprune.advise(mlp(), X, speed=True)
    assert all(o.speedup is not None and o.speedup > 0 for o in advice.options)
    assert "faster" in str(advice)


def test_what_cannot_be_pruned_is_said() -> None:
    advice = graphprune.advise(nn.Linear(4, 3).eval(), torch.randn(5, 4))
    assert advice.recommended is None and not advice.options and "Nothing can be removed" in str(advice)
    assert advice.to_dict()["recommended"] is None
    size = graphprune.advise(nn.Linear(40, 30).eval(), torch.randn(5, 40), "size")
    assert {o.method for o in size.options} == {"masks"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"goal": "fast"}, "goal"),
        ({"tolerance": -1}, "tolerance"),
        ({"data": [torch.randn(3, 5)]}, "advise"),
        ({"data": []}, "no batch"),
        ({"evaluate": lambda m: None}, "evaluate"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphPruneError, match=text):
        graphprune.advise(mlp(), X, **options)
    with pytest.raises(GraphPruneError, match="masks"):
        graphprune.advise(sparsity.magnitude(mlp(), 0.5), X)
    with torch.device("meta"):
        empty = mlp()
    with pytest.raises(GraphPruneError, match="meta"):
        graphprune.advise(empty, X.to("meta"))
