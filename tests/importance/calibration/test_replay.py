"""What is replayed is what a plain run computes: over random networks, wave after wave, weights changed in between."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.importance.calibration import Reader, find_readers, observe
from graphprune.importance.calibration.replay import Replay
from graphprune.support.walking import named_tensors
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run
from tests.stream_networks import STEPS, STEPS_OF, WIDTH, Network, Step, block, branch, measured, routed


def in_order(readers: list[Reader]) -> list[list[Reader]]:
    level: dict[str, int] = {}
    for reader in readers:
        level[reader.weight] = 1 + max((level[w] for w in reader.after if w in level), default=-1)
    return [[r for r in readers if level[r.weight] == n] for n in range(1 + max(level.values()))]


def change(net: nn.Module, reader: Reader) -> None:
    """As a repair does: other weights, and a bias where there was none."""
    layer = net.get_submodule(reader.weight.rpartition(".")[0])
    with torch.no_grad():
        layer.weight.mul_(0.9).add_(0.05 * torch.randn_like(layer.weight))  # type: ignore[operator,union-attr,arg-type]
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(torch.full((WIDTH,), 0.1)))


def compare(net: nn.Module, batches: list[Any], changed: bool = True) -> list[Replay]:
    """Every wave with memory and without, over several batches."""
    readers = find_readers(record_run(net, batches[0]))
    order = in_order(readers)
    levels = {r.weight: n for n, wave in enumerate(order) for r in wave}
    weights = {n: t for n, t in named_tensors(net).items() if n in levels}
    memories = [Replay(levels, weights) for _ in batches]
    options = {"inputs": True, "outputs": True, "additions": True}
    for wave in order:
        for memory, batch in zip(memories, batches, strict=True):
            example = ExampleInput.of(batch)
            plain = observe(net, wave, example, **options)  # type: ignore[arg-type]
            memory.start(levels[wave[0].weight], frozenset(r.weight for r in wave))
            replayed = observe(net, wave, example, **options, replay=memory)  # type: ignore[arg-type]
            for name, calls in plain.items():
                assert len(calls) == len(replayed[name])
                for one, other in zip(calls, replayed[name], strict=True):
                    for a, b in ((one.x, other.x), (one.y, other.y), (one.other, other.other)):
                        assert (a is None) == (b is None)
                        assert a is None or b is None or torch.equal(a, b), name
        for reader in wave if changed else ():
            change(net, reader)
    return memories


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int) -> None:
    torch.manual_seed(seed)
    net = Network(random.Random(seed).choices(STEPS_OF, k=STEPS)).eval()
    compare(net, [torch.randn(6, WIDTH) for _ in range(2)])


@pytest.mark.parametrize("step", STEPS_OF, ids=lambda step: step.__name__)
def test_memory_is_of_use(step: Step) -> None:
    """Where the way through the network does not depend on what is refitted, nothing is run twice."""
    torch.manual_seed(0)
    net, by_value = Network([block, step, block, block]).eval(), (routed, measured, branch)
    (memory,) = compare(net, [torch.randn(6, WIDTH)], changed=step not in by_value)
    assert memory.usable == (step is not routed)  # which rows are picked has to be seen in every run


class Products(TorchDispatchMode):
    """Counts what reaches torch behind the memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def test_settled_layers_are_left_out() -> None:
    """The layers before the border are not computed: with memory a deep chain costs one layer per wave."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8))).eval()
    readers = find_readers(record_run(net, torch.randn(2, WIDTH)))
    order = in_order(readers)
    levels = {r.weight: n for n, wave in enumerate(order) for r in wave}
    memory = Replay(levels, {n: t for n, t in named_tensors(net).items() if n in levels})
    example, ran = ExampleInput.of(torch.randn(4, WIDTH)), []
    for n, wave in enumerate(order):
        memory.start(n, frozenset(r.weight for r in wave))
        with Products() as products:
            observe(net, wave, example, inputs=True, replay=memory)
        ran.append(products.count)
    assert ran[0] == 8 and ran[1] == 2 and max(ran[2:]) <= 2


class Counter(nn.Module):
    """Counts its calls in a buffer and uses the count: no two runs are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.seen.add_(1.0)
        return self.b(x.relu() * self.seen)


def test_state_that_outlives_a_run_is_no_memory() -> None:
    net = Counter().eval()
    readers = find_readers(record_run(net, torch.randn(2, WIDTH)))
    memory = Replay({"a.weight": 0, "b.weight": 1}, {r.weight: named_tensors(net)[r.weight] for r in readers})
    memory.start(0, frozenset(("a.weight",)))
    observe(net, readers, ExampleInput.of(torch.randn(2, WIDTH)), inputs=True, replay=memory)
    assert not memory.usable
