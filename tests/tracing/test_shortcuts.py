"""Calls that do not go through torch are recorded as those that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune import GraphPruneError
from graphprune.tracing import recorder as recorder_module
from graphprune.tracing.trace import Trace, record_run

aten = torch.ops.aten


class Many(nn.Module):
    """Every call that is known, also in forms that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.Conv2d(4, 4, 3, padding="same"),
            nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=2),
        ])  # fmt: skip
        self.norm, self.own = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.line, self.volume = nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 1)
        self.layer_norm, self.bare = nn.LayerNorm(4), nn.LayerNorm([5, 4], elementwise_affine=False)
        self.fc, self.free = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
        self.gelus = nn.ModuleList([nn.GELU(), nn.GELU("tanh")])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convs[0](x)).relu_()
        x = self.plain(self.own(self.convs[1](x) + x))
        x = torch.cat([F.silu(x), F.hardswish(self.convs[2](x)), torch.sigmoid(x)], 1)
        x = torch.cat((x[:, :4], x[:, 4:8]), dim=0) * x[:1, 8:]
        x = F.hardtanh(F.relu6(F.hardsigmoid(x)), -1.0, 2.0) + F.hardtanh(x) + F.hardtanh(x, -2.0, 1.0)
        x = self.convs[3](x).mul_(2.0).add_(x[:, :, :1, :1])
        x = x + self.volume(x[:, :, None]).squeeze(2).mul(0.5)
        y = F.conv2d(x[0], self.convs[3].weight, None).relu()  # no batch
        x = self.line(x.flatten(2)[..., :7]).transpose(1, 2).contiguous() + y.sum()
        x = self.bare(self.layer_norm(x)) + self.layer_norm(x.transpose(1, 2).contiguous().transpose(1, 2))
        x = torch.add(x, x, alpha=2).mul(x.sigmoid())
        return self.free(self.gelus[1](self.gelus[0](self.fc(x)))) + F.linear(input=x, weight=self.fc.weight).sum()


def said(trace: Trace) -> list[tuple[Any, ...]]:
    """All that a recording says, but for tensors that nothing reads."""
    return [
        (n.op, str(n.target), repr(n.args), repr(n.kwargs), *(repr(n.meta.get(k)) for k in ("val", "source", "sizes")))
        for n in trace.graph.nodes
        if n.target is not aten.empty.memory_format
    ]


def test_the_recording_is_the_one_that_torch_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Many().eval(), torch.randn(2, 3, 12, 12)
    quick = said(record_run(model, x, training_paths=True))
    monkeypatch.setattr(recorder_module, "ATEN", {})
    assert said(record_run(model, x, training_paths=True)) == quick
    assert {str(target) for target in (aten.convolution.default, aten.native_batch_norm.default, aten.cat.default)} < {
        row[1] for row in quick
    }


def test_most_calls_do_not_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    run = recorder_module.Recorder.run

    def noted(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        asked.append(str(target))
        return run(self, target, args, kwargs)

    monkeypatch.setattr(recorder_module.Recorder, "run", noted)
    record_run(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval(),
               torch.randn(1, 3, 2, 2))  # fmt: skip
    assert asked == ["aten.view.default"]


class Slope(nn.Module):
    """Its result is a derivative: calls must be known to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.b(torch.sigmoid(self.a(x))).sum(), x, create_graph=True)
        return slope


class Mapped(nn.Module):
    """Calls on one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: torch.relu(self.a(row)))(x)


class Tangent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.jvp(lambda v: torch.sigmoid(self.a(v)), (x,), (torch.ones_like(x),))[1]
        return out


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watched(nn.Module):
    """Looks at its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        with Counts() as counts:
            y = torch.relu(self.a(x))
        return y * float("aten.relu.default" in counts.seen)


class Inference(nn.Module):
    """Without autograd, torch leaves calls as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = F.conv1d(self.a(x)[:, None], self.a.weight[:2, None])
        return torch.relu(y.clone())


@pytest.mark.parametrize("kind", [Slope, Mapped, Tangent, Watched, Inference])
def test_torch_is_asked_where_something_lies_between(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = kind().eval(), torch.randn(2, 3)
    found = said(record_run(model, x))
    monkeypatch.setattr(recorder_module, "ATEN", {})
    assert said(record_run(model, x)) == found
    if kind is Watched:
        assert any(row[1] == "aten.mul.Tensor" and "1.0" in row[2] for row in found)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 4, 1)], [nn.Conv2d(3, 4, 9)], [nn.Conv2d(3, 4, 1).double()], [nn.BatchNorm2d(4)],
        [nn.Linear(5, 2)], [nn.LayerNorm(5)], [nn.BatchNorm1d(3)],
    ],
)  # fmt: skip
def test_what_torch_refuses_is_refused(layers: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 4, 4)
    refused = []
    for known in (recorder_module.ATEN, {}):
        monkeypatch.setattr(recorder_module, "ATEN", known)
        with pytest.raises(GraphPruneError) as error:
            record_run(model, x)
        refused.append(str(error.value))
    assert refused[0] == refused[1]
