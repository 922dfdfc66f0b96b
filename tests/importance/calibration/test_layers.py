"""Which layers read channels, in which order, and what their results are added to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune.importance.calibration import find_readers, observe
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 4, 3, padding=1)
        self.short = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Parameter(torch.randn(4, 5))
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.b(self.act(self.a(x)))
        y += self.short(x)
        return torch.addmm(self.shift, self.act(y).mean((2, 3)), self.fc)


def test_order_and_dependence() -> None:
    readers = {r.weight: r for r in find_readers(record_run(Block(), torch.randn(1, 3, 6, 6)))}
    assert list(readers) == ["stem.weight", "a.weight", "b.weight", "short.weight", "fc"]
    assert readers["stem.weight"].after == frozenset()
    # the shortcut is computed last: it can make up for what the main branch collected, and so comes after it
    assert readers["short.weight"].adds and readers["short.weight"].after == {"stem.weight", "a.weight", "b.weight"}
    assert not readers["b.weight"].adds
    assert (readers["fc"].in_axis, readers["fc"].out_axis, readers["fc"].bias) == (0, 1, "shift")


def test_what_is_observed_is_what_was_computed() -> None:
    net, x = Block().eval(), torch.randn(2, 3, 6, 6)
    readers = find_readers(record_run(net, x))
    calls = observe(net, readers, ExampleInput.of(x), inputs=True, outputs=True, additions=True)
    with torch.no_grad():
        stem = net.stem(x)
        inner = net.a(stem.relu())
        main = net.b(inner.relu())
        short = net.short(stem.relu())
    for name, read, made, other in [
        ("stem.weight", x, stem, None),
        ("a.weight", stem.relu(), inner, None),
        ("b.weight", inner.relu(), main, None),
        ("short.weight", stem.relu(), short, main),
    ]:
        (call,) = calls[name]
        assert call.x is not None and call.y is not None
        torch.testing.assert_close(call.x, read)
        torch.testing.assert_close(call.y, made)  # not what the activation wrote over it
        assert (call.other is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(call.other, other)


def test_shared_weights_have_several_calls_and_odd_uses_are_no_readers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.scaled = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(x).relu()).relu()
            return nn.functional.linear(x, self.scaled.weight * 2)

    net, x = Odd(), torch.randn(3, 4)
    (reader,) = find_readers(record_run(net, x))
    assert (reader.weight, reader.calls) == ("twice.weight", 2)
    assert len(observe(net, [reader], ExampleInput.of(x), inputs=True)[reader.weight]) == 2


def test_the_run_stops_early_and_leaves_the_model_alone() -> None:
    ran = []
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Linear(3, 1)).train()
    net[2].register_forward_pre_hook(lambda *_: ran.append(1))
    first = find_readers(record_run(net, torch.randn(1, 2)))[0]
    ran.clear()
    observe(net, [first], ExampleInput.of(torch.randn(1, 2)), outputs=True)
    assert not ran and net.training and net[1].training
