"""Rows that are picked by value carry their numbers along: against networks whose first feature is the row's number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune
from graphprune.importance.calibration import Call, find_readers, observe
from graphprune.importance.calibration.picks import Rows, common
from graphprune.tracing.example import ExampleInput
from graphprune.tracing.trace import record_run

ROWS, TOKENS, WIDTH = 6, 4, 5
Pick = Callable[[Tensor], Tensor]


def key(x: Tensor) -> Tensor:
    """One number per row, in no order."""
    return x[..., 1]


def kept(x: Tensor) -> Tensor:
    return x[key(x).argsort(0)[:3]]


# Rows of a batch, and of tokens of a batch.
PAIRED: dict[str, Pick] = {
    "index": kept,
    "index and columns": lambda x: x[key(x).argsort(0)[:3], :],
    "mask": lambda x: x[key(x) > 0],
    "where": lambda x: x[torch.where(key(x) > 0)[0]],
    "nonzero": lambda x: x[torch.nonzero(key(x) > 0)[:, 0]],
    "index_select": lambda x: x.index_select(0, key(x).argsort(0)[:4]),
    "index_select by name": lambda x: torch.index_select(x, dim=0, index=key(x).argsort(0)[:4]),
    "take_along_dim": lambda x: x.take_along_dim(key(x).argsort(0)[:4, None], 0),
    "gather": lambda x: x.gather(0, key(x).topk(3).indices[:, None].expand(-1, x.shape[1])),
    "top-k": lambda x: x[key(x).topk(3).indices],
    "sort": lambda x: x[key(x).sort().indices],
    "twice": lambda x: kept(x)[key(kept(x)) > -9][:, :],
    "picked of picked": lambda x: kept(x)[key(kept(x)).argmax().reshape(1)],
    "tail": lambda x: x[key(x).argsort(0)][2:],
    "split": lambda x: x[key(x).argsort(0)].split(2)[1],
    "chunk": lambda x: x[key(x).argsort(0)].chunk(3)[2],
    "flip": lambda x: kept(x).flip(0),
    "roll": lambda x: kept(x).roll(1, 0),
    "narrow": lambda x: kept(x).narrow(0, 1, 2),
    "joined": lambda x: torch.cat([x[key(x) > 0], x[key(x) <= 0]]),
    "repeated": lambda x: kept(x).repeat_interleave(2, 0),
    "functions on the way": lambda x: (kept(x) * 2).contiguous().view(3, -1).clone().to(torch.float32) / 2,
    "list of numbers": lambda x: x[key(x).argsort(0)[:3].tolist()],
    "first of them": lambda x: x[: int((key(x) > 0).sum())],
    "as a table": lambda x: F.embedding(key(x).argsort(0)[:3], x),
}
TOKEN: dict[str, Pick] = {
    "tokens by index": lambda x: x[torch.arange(ROWS)[:, None], key(x).topk(2, 1).indices],
    "tokens by mask": lambda x: x[key(x) > 0],
    "tokens in one row": lambda x: x.flatten(0, 1)[key(x).flatten().argsort()[:7]],
    "gathered tokens": lambda x: x.gather(1, key(x).topk(2, 1).indices[..., None].expand(-1, -1, x.shape[2])),
    "tokens along an axis": lambda x: x.take_along_dim(key(x).argsort(1)[..., None], 1),
}
# No row is a row any more, or each is a mixture: nothing may be said.
UNKNOWN: dict[str, Pick] = {
    "sorted values": lambda x: kept(x).sort(0).values,
    "turned": lambda x: F.pad(x[key(x).argsort(0)].t()[:WIDTH], (0, 0))[:, :WIDTH],
    "masked_select": lambda x: x.masked_select((key(x) > 0)[:, None]).view(-1, WIDTH),
    "added to others": lambda x: kept(x) + x[key(x).topk(3).indices],
}
# All are back where they were.
RESTORED: dict[str, Pick] = {
    "sorted and back": lambda x: x[key(x).argsort(0)][key(x).argsort(0).argsort(0)],
    "added to their places": lambda x: torch.zeros_like(x).index_add(0, key(x).argsort(0)[:3], kept(x)),
    "put in their places": lambda x: x.index_put((key(x).argsort(0)[:3],), kept(x)),
    "scattered": lambda x: x.scatter(0, key(x).argsort(0)[:3, None].expand(-1, WIDTH), kept(x)),
    "columns": lambda x: x[:, [0, 1, 2, 3, 4]],
}


class Net(nn.Module):
    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.pick, self.read = pick, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.pick(x))
        return out


def numbered(*shape: int) -> Tensor:
    x = torch.randn(*shape, WIDTH)
    x[..., 0] = torch.arange(x[..., 0].numel()).reshape(shape)
    return x


def seen(pick: Pick, x: Tensor) -> Call:
    net = Net(pick).eval()
    readers = find_readers(record_run(net, x))
    (call,) = observe(net, readers, ExampleInput.of(x), inputs=True, outputs=True)["read.weight"]
    return call


@pytest.mark.parametrize("name", [*PAIRED, *TOKEN])
def test_numbers_are_those_of_the_rows(name: str) -> None:
    x = numbered(ROWS) if name in PAIRED else numbered(ROWS, TOKENS)
    call = seen((PAIRED | TOKEN)[name], x)
    assert call.x is not None and call.rows is not None and call.rows.numbers is not None
    assert torch.equal(call.rows.numbers, call.x[..., 0].long())


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_said_of_mixtures(name: str) -> None:
    rows = seen(UNKNOWN[name], numbered(WIDTH if name == "turned" else ROWS)).rows
    assert rows is not None and rows.numbers is None


@pytest.mark.parametrize("name", RESTORED)
def test_rows_in_their_places_are_all_rows(name: str) -> None:
    assert seen(RESTORED[name], numbered(ROWS)).rows is None


def slow_common(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    both = sorted(set(a) & set(b))
    return [(i, j) for n in both for i, m in enumerate(a) for j, k in enumerate(b) if m == k == n]


@pytest.mark.parametrize("seed", range(20))
def test_what_both_hold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randperm(9, generator=generator)[: 2 + seed % 6] for _ in range(2))
    found = common(Rows(a, (9,), (a,)), Rows(b, (9,), (b,)))
    assert found is not None
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == slow_common(a.tolist(), b.tolist())


def test_rows_that_stand_there_twice_are_not_paired() -> None:
    a = torch.tensor([0, 1, 1])
    assert common(Rows(a, (3,), (a,)), Rows(a, (3,), (a,))) is None
    assert common(Rows(None, (), ()), Rows(a, (3,), (a,))) is None
    assert common(Rows(a[:2], (3,), ()), Rows(a[:2], (4,), ())) is None


class Routed(nn.Module):
    """Which rows a layer reads, and in which order, follows from what is pruned before it."""

    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)
        self.pick, self.a, self.b = pick, nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).relu())
        return self.b(self.a(self.pick(h)).relu())


@pytest.mark.parametrize("name", ["index", "mask", "list of numbers", "first of them", "joined", "sorted values"])
def test_other_rows_are_paired_or_left_out_with_a_reason(name: str) -> None:
    pick, x = (PAIRED | UNKNOWN)[name], torch.randn(256, 8)
    dense = Routed(pick).eval()
    plan = graphprune.plan(dense, x[:16], 0.4)
    found = graphprune.recover(dense, plan, x[:16], list(x.split(32)), "least_squares")
    said = {layer.weight: layer for layer in found.layers}["a.weight"]
    assert said.changed
    if name in ("mask", "first of them"):  # how long the outputs are follows from values
        assert found.after < 0.9 * found.before or found.unchecked
    else:
        assert found.after < 0.9 * found.before and not found.unchecked
    assert ("the two networks pick different rows for it on batch" in said.note) == (name in UNKNOWN)
