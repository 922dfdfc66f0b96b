"""Results of the dense network that are held for layers to come, against repairs that hold none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.recovery.repair import steps, walk
from graphprune.tracing.example import ExampleInput


class Residual(nn.Module):
    """Three blocks on a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = (nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(a(x).relu())
        out: Tensor = self.head(x.relu().mean((2, 3)))
        return out


def repaired(ahead: int, monkeypatch: pytest.MonkeyPatch) -> tuple[graphprune.Recovery, int, bool]:
    """The repair, how often the dense network was looked at, and whether a step was taken back."""
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(40, 3, 6, 6)
    looks, seen = [0], list[steps.Steps]()
    observe, made = walk.observe, steps.Steps.__init__

    def counted(model: nn.Module, *args: object, inputs: bool = False, **options: object) -> object:
        looks[0] += not inputs
        return observe(model, *args, inputs=inputs, **options)  # type: ignore[arg-type]

    def kept(self: steps.Steps, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        seen.append(self)

    monkeypatch.setattr(walk, "AHEAD", ahead)
    monkeypatch.setattr(walk, "observe", counted)
    monkeypatch.setattr(steps.Steps, "__init__", kept)
    plan = graphprune.plan(net, x[:1], 0.5)
    found = graphprune.recover(net, plan, x[:1], [x[:16], x[16:32], x[32:]], "least_squares")
    return found, looks[0], seen[0].refused


def test_one_look_at_the_dense_network_serves_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, many, _ = repaired(0, monkeypatch)
    fast, few, again = repaired(1 << 28, monkeypatch)
    assert any(layer.changed for layer in slow.layers)
    assert [str(layer) for layer in fast.layers] == [str(layer) for layer in slow.layers]
    for a, b in zip(fast.model.parameters(), slow.model.parameters(), strict=True):
        assert torch.equal(a, b)
    batches = 3  # the first visit looks at the first layer alone; then all at once, once for each visit
    assert few <= batches * (3 if again else 2) < many


def test_as_many_layers_as_memory_allows() -> None:
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(12, 3, 6, 6)
    small = Residual().eval()
    example = ExampleInput.of(x)

    class Data:
        def inputs(self) -> object:
            return iter([example])

    readers = graphprune.importance.calibration.find_readers(graphprune.tracing.trace.record_run(small, example))
    order = walk.waves(readers, lambda _: 0)
    pair = walk.Pair(net, small, Data(), order)  # type: ignore[arg-type]
    named = dict(small.named_parameters())
    targets = {r.weight: walk.Target(torch.arange(len(named[r.weight])), None) for r in readers}
    pair.gather(order[0], targets, lambda *_: None)
    one = 2 * 12 * 6 * 6 * 6 * 4  # bytes of a convolution's result, and of what it is added to
    for room, count in ((one - 1, 1), (2 * one, 2), (3 * one, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "AHEAD", room)
            assert [r.weight for r in pair._coming(order[1])] == [r.weight for w in order[1 : 1 + count] for r in w]
