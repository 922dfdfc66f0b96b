"""Outputs are compared in one precision, whatever types the code names; what cannot be is compared as it can."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune.plans.verification.precision import Computing, in_precision, precision_of
from graphprune.plans.verification.rewrite import _looked_up, _window
from graphprune.plans.verification.running import run
from graphprune.tracing.example import ExampleInput

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MASK = torch.linspace(-1, 1, 25, dtype=torch.bfloat16).view(5, 5)


class Masked(nn.Module):
    """Attention behind a LayerNorm, with a mask that is made in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.norm, self.o = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(8, 3)
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.slopes = torch.tensor([0.5, 0.25])
        self.table: Any = {"cos": torch.linspace(0, 1, 5).cos()}
        self.register_buffer("causal", torch.full((5, 5), -math.inf).triu(1), persistent=False)

    def mask(self, x: Tensor) -> Tensor | None:
        n = x.shape[1]
        if self.way == "input":
            return torch.linspace(-1, 1, n * n, dtype=x.dtype).view(n, n)
        if self.way == "alibi":
            places = torch.arange(n)
            return (self.slopes.view(2, 1, 1) * (places - places.view(-1, 1))).to(x.dtype)
        if self.way == "made half":
            return torch.zeros(n, n, dtype=torch.bfloat16).masked_fill(torch.ones(n, n).triu(1) > 0, -10).to(x.dtype)
        if self.way == "least":
            return torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return {"buffer": self.causal, "global": MASK.to(x.dtype)}.get(self.way)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.way == "rotary":
            q, k = (t * self.table["cos"].to(t.dtype).view(-1, 1) for t in (q, k))
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(h)).transpose(1, 2).flatten(2))


def passes(net: nn.Module, x: Tensor, **options: Any) -> graphprune.VerificationReport:
    """Of a network that loses something."""
    plan = graphprune.plan(net, x, 0.5, **options)
    assert plan.removed
    report = graphprune.verify(net, plan.apply(net), plan, x)
    assert report.passed, str(report)
    return report


@pytest.mark.parametrize("plain", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["input", "alibi", "made half", "least", "buffer", "global", "rotary"])
def test_masks_and_tables_in_any_precision(way: str, dtype: torch.dtype, plain: torch.dtype | None) -> None:
    net, x = Masked(way).to(dtype).eval(), torch.randn(2, 5, 6).to(dtype)
    net.slopes = net.slopes.to(plain or dtype)
    net.table = {"cos": net.table["cos"].to(plain or dtype)}
    passes(net, x)


class Cast(nn.Module):
    """Types in the code: `path` says which."""

    def __init__(self, path: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path = path
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 4)
        self.norm = nn.LayerNorm(24) if path != "batch" else nn.BatchNorm1d(24)
        self.kind, self.cache = torch.bfloat16, torch.zeros(3, 1, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        own = x.dtype
        if self.path == "complex":
            x = torch.fft.ifft(torch.fft.fft(x.float(), dim=0).to(torch.complex64), dim=0).real.to(own) + x
        h = self.a(x)
        if self.path == "half":
            h = self.norm(torch.relu(h.half().to(own)))
        elif self.path == "bfloat16":
            h = self.norm(h.bfloat16().relu().to(own))
        elif self.path == "double":
            h = self.norm(h.double().cumsum(0).to(own))
        elif self.path == "float":
            h = (h.float() * h.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(own)
        elif self.path == "attribute":
            h = self.norm(h.to(self.kind).to(own))
        elif self.path == "softmax":
            h = torch.softmax(h, -1, dtype=torch.float32).to(own)
        elif self.path == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                h = self.norm(h).relu()
            h = h.to(own)
        elif self.path == "written":
            kept = self.cache.clone()
            kept[: len(x)] = x[:, :1]
            kept.add_(x[:, 1:2])
            h = self.norm(h + kept.to(own))
        elif self.path == "complex":
            h = self.norm(h)
        elif self.path == "random":
            h = self.norm(h + torch.rand(h.shape[0], 1, dtype=torch.float32).to(own))
        elif self.path == "checked":
            assert h.dtype is (torch.bfloat16 if own is torch.bfloat16 else own) and own is self.expected
            h = self.norm(h.half().to(own))
        elif self.path == "bits":
            h = self.norm(h) * (1 + 0 * h.detach().sum(-1, keepdim=True).float().view(torch.int32).to(own))
        return self.b(h)


PATHS = ["half", "bfloat16", "double", "float", "attribute", "softmax", "autocast", "written", "complex", "random"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_types_in_the_code(path: str, dtype: torch.dtype) -> None:
    net, x = Cast(path).to(dtype).eval(), torch.randn(3, 6).to(dtype)
    report = passes(net, x)
    assert "only" not in str(report) and all(check.error < 1e-5 for check in report.checks if check.error >= 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_code_that_runs_in_one_precision_is_compared_in_that(dtype: torch.dtype) -> None:
    net, x = Cast("checked").to(dtype).eval(), torch.randn(3, 6).to(dtype)
    net.expected = dtype  # type: ignore[assignment]
    plan = graphprune.plan(net, x, 0.5)
    report = graphprune.verify(net, plan.apply(net), plan, x)
    assert report.passed and f"{dtype} only" in str(report)
    small = plan.apply(net)
    with torch.no_grad():
        small.b.weight.mul_(1.5)
    assert {c.name for c in graphprune.verify(net, small, plan, x).checks if not c.passed} >= {"state"}


@pytest.mark.parametrize("norm", [torch.float32, torch.float64])
def test_norms_in_another_precision_than_the_rest(norm: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm2d(16), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.norm(self.a(x).to(norm)).half()))

    net, x = Mixed().half().eval(), torch.randn(2, 3, 8, 8).half()
    net.norm.to(norm)  # the first parameter, and in no half precision
    for fold in (False, True):
        passes(net, x, fold_bn=fold)


# -- the mode itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [path for path in PATHS if path != "random"])  # of which other numbers are drawn
def test_all_is_computed_in_one_precision(path: str, dtype: torch.dtype) -> None:
    """Against the code with every type that it names replaced by hand."""
    net, x = Cast(path).eval(), torch.randn(3, 6)
    plain = copy.deepcopy(net).to(dtype)
    plain.cache = plain.cache.to(dtype)
    exact, y = in_precision(net, dtype), x.to(dtype)
    assert {t.dtype for t in (exact.cache, *exact.parameters())} == {dtype}
    found = run(exact, ExampleInput.of(y), "test", dtype)

    def by_hand(h: Tensor) -> Tensor:
        if path == "double":
            return plain.norm(h.cumsum(0))
        if path == "float":
            return h * h.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        if path == "softmax":
            return torch.softmax(h, -1)
        if path == "written":
            return plain.norm(h + y[:, :1] + y[:, 1:2])
        if path == "autocast":
            return plain.norm(h).relu()
        return plain.norm(h.relu() if path in ("half", "bfloat16") else h)

    start = torch.fft.ifft(torch.fft.fft(y, dim=0), dim=0).real + y if path == "complex" else y
    wanted = plain.b(by_hand(plain.a(start)))
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13 if dtype is torch.float64 else 1e-5)


def test_bits_of_numbers_are_refused_and_compared_natively() -> None:
    with pytest.raises(graphprune.GraphPruneError, match="bits"), Computing(torch.float64):
        torch.randn(2).view(torch.int32)
    net, x = Cast("bits").eval(), torch.randn(3, 6)
    plan = graphprune.plan(net, x, 0.5)
    assert graphprune.verify(net, plan.apply(net), plan, x).passed


def test_the_coarsest_precision_counts() -> None:
    kinds = torch.float64, torch.float32, torch.float16, torch.bfloat16
    tensors = [torch.zeros(1, dtype=kind) for kind in kinds]
    assert [precision_of(tensors[: i + 1]) for i in range(4)] == list(kinds)
    assert precision_of([torch.zeros(1, dtype=torch.int8)]) is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_networks_are_held_to_more(dtype: torch.dtype) -> None:
    """A batch norm that is folded with another eps than its own, which float32 would not show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype).eval()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    plan = graphprune.plan(net, x, 0.5)
    small = plan.apply(net)
    assert plan.folds and graphprune.verify(net, small, plan, x).passed
    net[1].eps = 2e-5
    report = graphprune.verify(net, small, plan, x)
    failed = {check.name for check in report.checks if not check.passed}
    assert failed == ({"state", "zero equivalence"} if dtype is torch.float64 else {"state"})


# -- windows


class Windows(nn.Module):
    """Windows over a signal, in front of a norm."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.stem, self.join = nn.Conv1d(1, 6, 3, padding=1), nn.Conv1d(6, 1, 1)
        self.i, self.norm, self.o = nn.LazyLinear(16), nn.LayerNorm(16), nn.Linear(16, 5)

    def windows(self, x: Tensor) -> Tensor:
        batch, time = x.shape
        if self.way.startswith("stft"):
            window = torch.hann_window(64) if "hann" in self.way else torch.ones(64)
            return torch.stft(x, 64, 16, window=window, center="center" in self.way, return_complex=True).abs().mT
        if self.way == "one signal":
            return torch.stft(x[0], 64, 16, window=torch.hann_window(64), return_complex=True).abs().mT
        if self.way == "back":
            window = torch.hann_window(64)
            spectrum = torch.stft(x, 64, 16, window=window, return_complex=True)
            return torch.istft(spectrum, 64, 16, window=window).unfold(1, 32, 16)
        if self.way == "strided":
            return x.as_strided((batch, time // 16 - 1, 32), (x.stride(0), 16, 1))
        if self.way == "offset":
            return x.as_strided((batch, time // 16 - 2, 32), (time, 16, 1), 8)
        if self.way == "turned":
            turned = x.t()
            return turned.as_strided((batch, time // 16 - 1, 32), (turned.stride(1), 16, 1))
        return torch.as_strided(x * 1.5, (batch, 5, 32), (time, 32, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.join(torch.relu(self.stem(x.unsqueeze(1)))).squeeze(1)
        return self.o(self.norm(torch.relu(self.i(self.windows(x)))))


@pytest.mark.parametrize(
    "way", ["stft", "stft hann", "stft hann center", "one signal", "back", "strided", "offset", "turned", "function"]
)
def test_windows_in_front_of_a_norm(way: str) -> None:
    net, x = Windows(way), torch.randn(2, 800)
    with torch.no_grad():
        net(x)
    net.eval()
    small = graphprune.prune(net, x, 0.5)
    assert small.i.out_features == 8 and small.stem.out_channels == 3
    plan = graphprune.plan(net, x, 0.5)
    report = graphprune.verify(net, small, plan, x)
    assert report.passed and "rewritten graph" in str(report)
    with torch.no_grad():
        small.norm.weight[0] *= 1.5
    failed = {check.name for check in graphprune.verify(net, small, plan, x).checks if not check.passed}
    assert failed == {"rewritten graph", "state"}


def test_windows_are_looked_up_as_as_strided_does() -> None:
    """A tensor that lies in memory otherwise than it did, against as_strided on one that lies as it did."""
    base = torch.randn(4, 3, 10)
    for x, window in (
        (base[:, 1], ((4, 4, 4), (30, 2, 1), None)),
        (base[:, 1], ((3, 4), (30, 2), 12)),
        (base.transpose(0, 2), ((10, 6), (1, 5), None)),
        (base[1:, :, ::2], ((3, 3, 2), (30, 10, 4), 30)),
        (base, ((0, 3), (1, 1), None)),
        (base[:1].expand(5, 3, 10), ((5, 6), (0, 5), None)),
    ):
        layout = x.stride(), x.storage_offset()
        args = [x, *window]
        found = _looked_up(x.clone().contiguous(), layout, *_window(args, {}, layout[1]))
        assert torch.equal(found, x.as_strided(*window))
    with pytest.raises(graphprune.GraphPruneError, match="do not belong"):
        _looked_up(base[:, 1].clone(), (base[:, 1].stride(), 10), [2, 12], [30, 1], 10)
