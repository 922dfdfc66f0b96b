"""Networks that talk to other processes in their forward: channels go as without it (here one process, gloo)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

import graphprune


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _reduced(h: Tensor) -> Tensor:
    h = h.clone()
    dist.all_reduce(h)
    return h


def _centred(h: Tensor) -> Tensor:
    """As batch norms do that share their statistics."""
    mean = h.mean(0)
    dist.all_reduce(mean)
    return h - mean / dist.get_world_size()


def _sent(h: Tensor) -> Tensor:
    h = h.clone()
    dist.broadcast(h, 0)
    return h


def _gathered(h: Tensor) -> Tensor:
    parts = [torch.empty_like(h) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, h)
    return torch.cat(parts)


def _gathered_into_one(h: Tensor) -> Tensor:
    out = h.new_empty(len(h) * dist.get_world_size(), h.shape[1])
    dist.all_gather_into_tensor(out, h)
    return out


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": _reduced,
    "centred": _centred,
    "broadcast": _sent,
    "all_gather": _gathered,
    "all_gather_into_tensor": _gathered_into_one,
    "differentiable all_reduce": lambda h: differentiable.all_reduce(h),
    "differentiable all_gather": lambda h: torch.cat(differentiable.all_gather(h)),
    "functional all_reduce": lambda h: functional.all_reduce(h, "sum", dist.group.WORLD),
    "functional all_gather": lambda h: functional.all_gather_tensor(h, 0, dist.group.WORLD),
    "functional reduce_scatter": lambda h: functional.reduce_scatter_tensor(h, "sum", 0, dist.group.WORLD),
}


class Talks(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor], norm: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.call(self.norm(self.first(x)))).relu())
        return out


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_channels_go_as_without_other_processes(call: str, norm: bool) -> None:
    torch.manual_seed(0)
    model, x = Talks(CALLS[call], norm).eval(), torch.randn(5, 3)
    alone = _centred_alone if call == "centred" else lambda h: h
    plain = Talks(alone, norm).eval()
    plain.load_state_dict(model.state_dict())
    plan, wanted = (graphprune.plan(net, x, 0.5, criterion="l1") for net in (model, plain))
    small = plan.apply(model)
    assert plan.removed == wanted.removed and len(plan.removed["second.weight"][1]) == 8
    with torch.no_grad():  # what gathers into one tensor is not differentiable
        torch.testing.assert_close(small(x), wanted.apply(plain)(x))
    report = graphprune.verify(model, small, plan, x)
    assert report.passed, str(report)


def _centred_alone(h: Tensor) -> Tensor:
    return h - h.mean(0)


def test_what_is_gathered_into_another_size_stays() -> None:
    def gathered(h: Tensor) -> Tensor:
        out = h.new_empty(1, *h.shape)
        dist.all_gather_into_tensor(out, h[None])
        literal = h.new_empty(5, 16)
        dist.all_gather_into_tensor(literal, h)
        return out[0] + literal

    model = Talks(gathered, False).eval()
    small = graphprune.prune(model, torch.randn(5, 3), 0.5)
    assert small.first.out_features == 16 and small.second.out_features == 6


@pytest.mark.parametrize("training", [False, True])
def test_synchronised_batch_norms(training: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
    x = torch.randn(2, 3, 8, 8)
    plain = nn.Sequential(*layers).train(training)
    wanted = graphprune.prune(plain, x, 0.5)
    found = graphprune.prune(nn.SyncBatchNorm.convert_sync_batchnorm(plain).train(training), x, 0.5)
    assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    torch.testing.assert_close(found.eval()(x), wanted.eval()(x))
