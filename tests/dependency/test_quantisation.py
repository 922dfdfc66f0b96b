"""Quantisation-aware modules: scales, zero points and ranges per channel go with their channels."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import graphprune
from tests import oracles

quantization = pytest.importorskip("torch.ao.quantization")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Open(nn.Module):
    """Fake quantisation written out: weights per channel, activations per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.weights = quantization.FakeQuantize(
            observer=quantization.PerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
            qscheme=torch.per_channel_affine, ch_axis=0,
        )  # fmt: skip
        self.activations = quantization.FakeQuantize(
            observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weights(self.first.weight), self.first.bias)
        out: Tensor = self.second(self.activations(y.relu()))
        return out


def prepared() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
        base.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        made: nn.Module = quantization.prepare_qat(base)
    return made


@pytest.mark.parametrize(
    ("build", "first", "second", "prefix"),
    [(Open, "first", "second", "weights"), (prepared, "0", "2", "0.weight_fake_quant")],
)
def test_scales_follow_their_channels(build: type[nn.Module], first: str, second: str, prefix: str) -> None:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        model(X)  # observers see what there is
        model.get_parameter(f"{first}.weight")[:] *= torch.linspace(0.5, 2, 8).reshape(-1, 1, 1, 1)
        model(X)
    model.apply(quantization.disable_observer)
    model.eval()
    plan = graphprune.plan(model, X, 0.5)
    gone = plan.removed[f"{first}.weight"][0]
    assert len(gone) == 4
    small = graphprune.prune(model, X, 0.5)
    kept = [i for i in range(8) if i not in gone]
    found, before = dict(small.named_buffers()), dict(model.named_buffers())
    for name in (f"{prefix}.scale", f"{prefix}.zero_point"):
        assert torch.equal(found[name], before[name][kept])
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_parameter(f"{second}.weight")[:, list(gone)] = 0
    assert oracles.relative_error(small(X), reference(X)) < 1e-6
