"""An export, also one that fails, leaves in the model what was there before."""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune


@dataclasses.dataclass
class Record:
    feature: Any = None


HOW = ("containers", "replaced buffer", "written buffer")


class Inner(nn.Module):
    def __init__(self, kept: dict[str, Any], how: str) -> None:
        super().__init__()
        self.conv, self.kept, self.how = nn.Conv2d(3, 4, 3), kept, how
        self.slot, self.record = kept["slot"], kept["record"]
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        feature = h.detach()
        if self.how == "containers":
            self.feature = self.slot[0] = self.record.feature = feature
            self.kept["list"].append(feature)
            self.kept["deque"].append(feature)
            self.kept["ordered"]["first"] = feature
            self.kept["nested"][0]["deep"].append([feature])
            self.kept["set"].add(feature)
            self.kept["new"] = feature
        elif self.how == "replaced buffer":
            self.mean = feature.mean((0, 2, 3))
        else:
            self.mean.add_(feature.mean((0, 2, 3)))
        return h


class Outer(nn.Module):
    def __init__(self, how: str, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept: dict[str, Any] = {
            "slot": [torch.rand(1)], "list": [], "ordered": collections.OrderedDict(zero=1), "nested": [{"deep": []}],
            "set": {1}, "deque": collections.deque(maxlen=2), "record": Record(),
        }  # fmt: skip
        self.inner, self.conv = Inner(self.kept, how), nn.Conv2d(4, 2, 3)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.inner(x))
        return torch.linalg.eigvals(y).real if self.fails else y  # no operator of ONNX


def _contents(value: Any) -> Any:
    """Slow and obvious: the values, with tensors as lists."""
    if isinstance(value, Tensor):
        assert type(value) in (Tensor, nn.Parameter)
        return value.tolist()
    if isinstance(value, Record):
        return _contents(value.feature)
    if isinstance(value, dict):
        return [(k, _contents(v)) for k, v in value.items()]
    return [_contents(v) for v in value] if isinstance(value, (list, set, collections.deque)) else value


def _state(net: Outer) -> Any:
    attributes = [sorted(n for n in vars(m)) for m in net.modules()]
    flags = [(p.requires_grad, p.grad) for p in net.parameters()]
    tensors = [(name, id(t), t.tolist()) for name, t in net.state_dict(keep_vars=True).items()]
    return id(net.kept), _contents(net.kept), attributes, flags, tensors, [m.training for m in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_the_model_holds_what_it_held(how: str, fails: bool, tmp_path: Path) -> None:
    net, x = Outer(how, fails).train(), torch.randn(2, 3, 8, 8)
    net.inner.conv.weight.requires_grad_(False)
    before = _state(net)
    if fails:
        with pytest.raises(graphprune.GraphPruneError, match="cannot be exported"):
            graphprune.export_onnx(net, x, tmp_path / "net.onnx")
    else:
        try:
            graphprune.export_onnx(net, x, tmp_path / "net.onnx", dynamic_batch=False)
        except graphprune.GraphPruneError:
            assert how != "containers"  # refused or not, nothing stays
    assert _state(net) == before
    assert net.kept is net.inner.kept and net.kept["slot"] is net.inner.slot
    copy.deepcopy(net)
    torch.save(net, io.BytesIO())
    assert graphprune.plan(net, x, 0.5).apply(net).inner.conv.weight.shape[0] == 2


def test_what_hooks_have_heard(tmp_path: Path) -> None:
    heard: list[Tensor] = []
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)
    net[0].register_forward_hook(lambda module, inputs, output: heard.append(output))
    net(x)
    before = list(heard)
    graphprune.export_onnx(net, x, tmp_path / "net.onnx")
    assert len(heard) == 1 and heard[0] is before[0]


def test_verification_leaves_nothing_behind() -> None:
    net, x = Outer("containers").eval(), torch.randn(2, 3, 8, 8)
    plan = graphprune.plan(net, x, 0.5)
    small = plan.apply(net)
    before = _state(net), _state(small)
    assert graphprune.verify(net, small, plan, x).passed
    assert (_state(net), _state(small)) == before
