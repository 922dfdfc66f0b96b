from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import graphprune
from graphprune import GraphPruneError

CONVOLUTIONS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


def with_ring(layer: nn.Module, rings: list[int], value: float = 0.0) -> nn.Module:
    """The outer `rings[axis]` taps on both sides of every axis set to `value`."""
    with torch.no_grad():
        inner = layer.weight.clone()
        layer.weight.fill_(value)
        window = tuple(slice(r, n - r) for r, n in zip(rings, layer.weight.shape[2:], strict=True))
        layer.weight[(slice(None), slice(None), *window)] = inner[(slice(None), slice(None), *window)]
    return layer


@given(data=st.data())
@settings(max_examples=60)
def test_random_convolutions_with_empty_rings(data: st.DataObject) -> None:
    """Every kind of convolution computes the same with the smaller kernel, where the padding allows it."""
    dims = data.draw(st.integers(1, 3))
    transposed = data.draw(st.booleans())
    axes = st.lists(st.integers(1, 7), min_size=dims, max_size=dims)
    kernel = data.draw(axes)
    dilation = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    stride = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    groups = data.draw(st.sampled_from((1, 2)))
    options: dict[str, object] = {"dilation": dilation, "groups": groups, "bias": data.draw(st.booleans())}
    padding: object = [data.draw(st.integers(0, d * (k - 1) // 2 + 1)) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        options["output_padding"] = [min(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    else:
        options["padding_mode"] = data.draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
        if data.draw(st.booleans()):
            padding, stride = "same", [1] * dims
    layer = CONVOLUTIONS[dims, transposed](4, 6, kernel, stride, padding, **options)
    rings = [data.draw(st.integers(0, (k - 1) // 2)) for k in kernel]
    with_ring(layer, rings)
    x = torch.randn(2, 4, *(14,) * dims)
    try:
        want = layer(x)
    except RuntimeError:
        return  # padding that this mode does not take
    plan = graphprune.plan_kernels(layer, x, 0.0)
    small = graphprune.shrink_kernels(layer, x, 0.0)
    torch.testing.assert_close(small(x), want, atol=1e-5, rtol=1e-5)
    for axis, (k, r, d) in enumerate(zip(kernel, rings, dilation, strict=True)):
        room = r if padding == "same" else min(r, padding[axis] // d)
        assert small.kernel_size[axis] == small.weight.shape[axis + 2] == k - 2 * room
    assert bool(plan.frozen) == any(padding != "same" and padding[a] // dilation[a] < r for a, r in enumerate(rings))


def slow_rings(weight: Tensor, threshold: float) -> list[int]:
    """Cut pair by pair from the tensor itself."""
    whole, now = float(weight.double().square().sum()), weight.double()
    rings = [0] * (weight.dim() - 2)
    while True:
        best = None
        for axis in range(2, now.dim()):
            n = now.shape[axis]
            if n > 2:
                inner = now.narrow(axis, 1, n - 2)
                lost = float(now.square().sum() - inner.square().sum())
                if best is None or lost < best[0] - 1e-12:
                    best = (lost, axis, inner)
        if best is None or whole - float(best[2].square().sum()) > threshold * whole * (1 + 1e-9):
            return rings
        rings[best[1] - 2] += 1
        now = best[2]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.8])
def test_the_share_of_the_energy_decides(seed: int, threshold: float) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 4, (7, 5), padding=(3, 2))
    with torch.no_grad():
        layer.weight.mul_(torch.rand(7, 5).square())
        if seed % 2:
            layer.weight.mul_(F.pad(torch.ones(5, 3), (1, 1, 1, 1), value=0.1))
    expected = slow_rings(layer.weight, threshold)
    small = graphprune.plan_kernels(layer, torch.randn(1, 3, 9, 9), threshold).apply(layer)
    assert list(small.kernel_size) == [7 - 2 * expected[0], 5 - 2 * expected[1]]


def test_what_goes_counts_as_zero_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 6, 5, padding=2), nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6)
    model = nn.Sequential(with_ring(first, [1, 1], 1e-3), nn.ReLU(), second, nn.Flatten(), nn.Linear(6 * 25, 3))
    x = torch.randn(2, 3, 10, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = graphprune.plan_kernels(model, x)
    small = plan.apply(model)
    assert small[0].kernel_size == (3, 3) and small[0].padding == (1, 1) and small[2].kernel_size == (5, 5)
    zeroed = copy.deepcopy(model)
    with_ring(zeroed[0], [1, 1])
    torch.testing.assert_close(small(x), zeroed(x))
    assert graphprune.verify(model, small, plan, x).passed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert graphprune.count(small, x).macs < graphprune.count(model, x).macs


def test_then_channels_and_files(tmp_path: Path) -> None:
    model = nn.Sequential(with_ring(nn.Conv2d(3, 8, 5, padding=2, padding_mode="reflect"), [1, 1]), nn.Conv2d(8, 4, 3))
    x = torch.randn(1, 3, 9, 9)
    plan = graphprune.plan_kernels(model, x)
    assert graphprune.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    small = graphprune.prune(plan.apply(model), x, 0.5)
    assert small[0].weight.shape == (4, 3, 3, 3) and small(x).shape == model(x).shape
    graphprune.export_onnx(small, x, tmp_path / "small.onnx")


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = with_ring(nn.Conv2d(3, 4, 3, padding=1), [1, 1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.conv.weight.sum((2, 3))


def test_kernels_that_must_stay_are_named() -> None:
    x = torch.randn(1, 3, 8, 8)
    tied = nn.Sequential(with_ring(nn.Conv2d(3, 3, 3, padding=1), [1, 1]), nn.Conv2d(3, 3, 3, padding=2))
    tied[1].weight = tied[0].weight
    cases = {
        "padding is smaller": with_ring(nn.Conv2d(3, 4, 3), [1, 1]),
        "forward of its own": with_ring(Standardised(3, 4, 3, padding=1), [1, 1]),
        "something other": Regularised(),
        "shared": tied,
        "parametrisation": weight_norm(with_ring(nn.Conv2d(3, 4, 3, padding=1), [1, 1])),
    }
    for reason, model in cases.items():
        plan = graphprune.plan_kernels(model, x)
        assert plan.empty and reason in plan.frozen[0], reason


def test_ignore_and_errors() -> None:
    model = nn.Sequential(
        with_ring(nn.Conv2d(3, 3, 3, padding=1), [1, 1]), with_ring(nn.Conv2d(3, 3, 3, padding=1), [1, 1])
    )
    x = torch.randn(1, 3, 8, 8)
    for ignore in ("0", model[0], ["0.weight"]):
        assert list(graphprune.plan_kernels(model, x, ignore=ignore).removed) == ["1.weight"]
    with pytest.raises(GraphPruneError, match="nowhere"):
        graphprune.plan_kernels(model, x, ignore="nowhere")
    for bad in (-0.1, 1.0, "a", True):
        with pytest.raises(GraphPruneError, match="threshold"):
            graphprune.plan_kernels(model, x, bad)  # type: ignore[arg-type]
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(GraphPruneError, match="finite"):
        graphprune.plan_kernels(model, x)
