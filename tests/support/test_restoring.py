"""A model that was run holds what it held, wherever its code keeps something."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.support.reach import reachable
from graphprune.support.restoring import restored


@dataclasses.dataclass
class Record:
    feature: Any = None


class Slotted:
    __slots__ = ("__hidden", "feature")

    def __init__(self) -> None:
        self.feature: Any = None
        self.__hidden: list[Any] = []

    def add(self, value: Any) -> None:
        self.feature = value
        self.__hidden.append(value)

    def content(self) -> tuple[Any, ...]:
        return self.feature, tuple(self.__hidden)


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def hear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.heard.append(output)


class Net(nn.Module):
    def __init__(self, keep: Callable[[Any, Tensor], Any], fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(2))
        self.plain = torch.ones(3)
        self.listed: list[Any] = [1, {"deep": [()], "inner": {"set": {1}}}]
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.counts: Any = collections.defaultdict(list, known=[1])
        self.last: Any = collections.deque([1], maxlen=2)
        self.record, self.slotted, self.held = Record(), Slotted(), types.SimpleNamespace(x=1)
        self.keep, self.fails = keep, fails

    def forward(self, x: Tensor) -> Tensor:
        self.keep(self, x)
        if self.fails:
            raise ValueError("the model's own")
        return self.layer(x)


def nested(m: Any, x: Tensor) -> None:
    m.listed[1]["deep"].append(x)
    m.listed[1]["inner"]["set"].add(2)
    del m.listed[0]


def reordered(m: Any, x: Tensor) -> None:
    m.ordered.move_to_end("a")
    m.counts["new"].append(x)
    m.last.extend([x, x])


def slots(m: Any, x: Tensor) -> None:
    m.slotted.add(x)


def values(m: Any, x: Tensor) -> None:
    m.count.add_(1)
    m.plain.mul_(2)
    m.count.data[0] = 7


def tables(m: Any, x: Tensor) -> None:
    m.extra = nn.Linear(2, 2)
    m.register_buffer("another", x)
    m.count = x
    m.layer.register_forward_hook(lambda *_: None)
    m.layer.weight.requires_grad_(False)
    del m.layer.bias
    m.layer.register_parameter("bias", None)


def attributes(m: Any, x: Tensor) -> None:
    m.new = x
    m.record.feature, m.held.y = x, x
    del m.plain


KEEPS = (nested, reordered, slots, values, tables, attributes)


def _snapshot(net: nn.Module) -> list[Any]:
    """Everything reachable, by identity and by content; slow and obvious."""
    found = []
    for value in reachable(net):
        if isinstance(value, Tensor):
            found.append((id(value), value.detach().tolist(), value.requires_grad))
        elif isinstance(value, dict):
            found.append((id(value), [(k, id(v)) for k, v in value.items()]))
        elif isinstance(value, (list, tuple, set, collections.deque)):
            found.append((id(value), [id(v) for v in value]))
        elif isinstance(value, Slotted):
            found.append((id(value), [id(v) for v in value.content()[1]]))
        else:
            found.append((id(value), [(k, id(v)) for k, v in getattr(value, "__dict__", {}).items()]))
    return found


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("keep", KEEPS, ids=lambda f: f.__name__)
def test_all_is_as_before(keep: Callable[[Any, Tensor], Any], fails: bool) -> None:
    net, x = Net(keep, fails), torch.randn(2, 4)
    before, contents = _snapshot(net), net.slotted.content()
    with pytest.raises(ValueError, match="own") if fails else contextlib.nullcontext(), restored(net):
        try:
            net(x)
        finally:
            assert _snapshot(net) != before
    assert _snapshot(net) == before
    assert net.slotted.content() == contents


def test_containers_stay_shared() -> None:
    shared: list[Any] = [None]
    net = nn.Sequential(Net(lambda m, x: m.kept.__setitem__(0, x)), Net(lambda m, x: None))
    for part in net:
        part.kept = shared
    with restored(net):
        net(torch.randn(2, 4))
        net[1].kept = [3]
    assert net[0].kept is net[1].kept is shared
    assert shared == [None]


def test_what_hooks_keep() -> None:
    net, listener, seen = nn.Linear(2, 2), Listener(), []
    net.register_forward_hook(listener.hear)
    net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with restored(net):
        net(torch.randn(1, 2))
    assert not listener.heard and len(seen) == 1
    with restored(net, closures=True):
        net(torch.randn(1, 2))
    assert len(seen) == 1


def test_gradients_and_tensors_made_in_inference_mode() -> None:
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        net.register_buffer("kept", torch.zeros(2))
    with restored(net):
        net(torch.randn(1, 2)).sum().backward()
        with torch.inference_mode():
            net.kept.add_(1)
        assert net.weight.grad is not None
    assert net.weight.grad is None and net.bias.grad is None
    assert net.kept.tolist() == [0, 0]


def test_what_does_not_belong_to_the_model_is_not_followed() -> None:
    import logging

    net = nn.Linear(2, 2)
    net.log, net.kind, net.function = logging.getLogger("mine"), Record, copy.copy  # type: ignore[assignment]
    assert not any(isinstance(value, (logging.Manager, types.ModuleType)) for value in reachable(net))


def test_a_buffer_that_borrowed_a_parameter_s_memory_gets_its_own_back() -> None:
    """Its values must not be written to where it points by then."""

    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("last", torch.zeros(3, 3))

    model = Borrows()
    weight, place = model.layer.weight.detach().clone(), model.last.data_ptr()
    with restored(model):
        model.last.data = model.layer.weight.data
    assert torch.equal(model.layer.weight, weight)
    assert model.last.data_ptr() == place and not model.last.any()
