"""What is watched against hooks and against torch's own batch norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from graphprune.synthesis.norms import Seen, Watching, mismatch
from graphprune.synthesis.running import run_seen
from graphprune.tracing.example import ExampleInput

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "1d over time": (lambda: nn.BatchNorm1d(4), (6, 4, 5)),
    "2d": (lambda: nn.BatchNorm2d(4), (6, 4, 5, 3)),
    "3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "plain": (lambda: nn.BatchNorm2d(4, affine=False, eps=0.1), (6, 4, 5, 3)),
    "synchronised": (lambda: nn.SyncBatchNorm(4), (6, 4, 5)),
}


def made(kind: str) -> tuple[nn.Module, Tensor]:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    norm = make().double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm, torch.randn(shape, dtype=torch.float64) * 2 + 1


def by_hand(norm: nn.Module, x: Tensor) -> Tensor:
    """The divergence, channel by channel."""
    parts = []
    for c in range(x.shape[1]):
        values = x.movedim(1, 0)[c].flatten()
        p = torch.distributions.Normal(values.mean(), (values.var(correction=0) + norm.eps).sqrt())
        q = torch.distributions.Normal(norm.running_mean[c], (norm.running_var[c] + norm.eps).sqrt())
        parts.append(torch.distributions.kl_divergence(p, q))
    return torch.stack(parts).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_results_figures_and_gradients(kind: str) -> None:
    norm, x = made(kind)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    with Watching() as watching:
        y = norm(first)
    wanted = norm(second)
    assert torch.allclose(y, wanted)
    found, expected = mismatch(watching.seen), by_hand(norm, second)
    assert torch.allclose(found, expected, rtol=1e-6)
    (found + y.square().sum()).backward()
    (expected + wanted.square().sum()).backward()
    assert first.grad is not None and second.grad is not None and torch.allclose(first.grad, second.grad)


def test_batch_norms_are_found_where_they_call_torch() -> None:
    norm, x = made("2d")
    mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    calls = [
        lambda: norm(x),
        lambda: F.batch_norm(x, mean, variance, weight, bias),
        lambda: F.batch_norm(x, mean, running_var=variance, weight=weight, bias=bias, eps=norm.eps),
        lambda: torch.batch_norm(x, weight, bias, mean, variance, False, 0.1, norm.eps, False),
    ]
    with Watching() as watching:
        results = [call() for call in calls]
    assert len(watching.seen) == 4 and all(torch.allclose(r, norm(x)) for r in results)
    assert all(torch.allclose(s.mismatch(), by_hand(norm, x)) for s in watching.seen)


def test_batch_norms_that_store_nothing_are_left_alone() -> None:
    _, x = made("2d")
    norm = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    with Watching() as watching:
        y = norm(x)
    assert not watching.seen and torch.equal(y, norm(x))


def test_half_precision_is_summed_in_single() -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 2, 16, 16) + 100).bfloat16()
    norm = nn.BatchNorm2d(2).eval().bfloat16()
    with Watching() as watching:
        y = norm(x)
    (seen,) = watching.seen
    assert y.dtype == torch.bfloat16 and seen.mean.dtype == torch.float32
    assert torch.allclose(seen.mean, x.float().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(seen.variance, x.float().var((0, 2, 3), correction=0), rtol=1e-3)


def test_no_divergence_where_both_are_equal_and_of_constant_channels() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert float(Seen(zero, one, zero, one, 1e-5).mismatch()) == 0
    assert float(Seen(zero, zero, zero, zero, 1e-5).mismatch()) == 0


def test_modules_that_compute_it_themselves_are_found_once() -> None:
    norm, x = made("2d")
    frozen = torchvision.ops.FrozenBatchNorm2d(4).double()
    frozen.load_state_dict({name: tensor for name, tensor in norm.state_dict().items() if "num" not in name})

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in norm.state_dict().items():
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[arg-type]

    for model in (frozen, Own()):
        (seen,) = run_seen(model, ExampleInput.of(x))
        assert torch.allclose(seen.mismatch(), by_hand(norm, x)) and not model._forward_pre_hooks
