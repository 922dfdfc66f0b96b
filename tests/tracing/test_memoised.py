"""A plan does not depend on what ran before: caches of functions neither tie sizes together nor hand on old ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.tracing.memoised import serves_a_cache
from graphprune.tracing.origin import Literal, TracedInt, is_traced, origin_of
from graphprune.tracing.trace import record_run


@functools.lru_cache(maxsize=64)
def per_head(width: int, heads: int) -> int:
    return width // heads


@functools.cache
def split(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (*shape[:-1], heads, shape[-1] // heads)


class Widths:
    @staticmethod
    @functools.lru_cache
    def of(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
        return (*shape[:-1], heads, shape[-1] // heads)


def uncached(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return (*x.shape[:-1], heads, x.shape[-1] // heads)


def by_function(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return (*x.shape[:-1], heads, per_head(x.shape[-1], heads))


def by_shape(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return split(x.shape, heads)


def by_static_method(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return Widths.of(x.shape, heads)


def by_method(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return net.cached(x.shape, heads)


def by_local(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    work_out = split
    return work_out(x.shape, heads)


class Net(nn.Module):
    """Heads of two layers, of equal width before pruning."""

    def __init__(self, sizes: Callable[..., tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(48, 5)
        self.heads, self.sizes, self.own = (4, 4), sizes, split

    @functools.lru_cache  # noqa: B019 - what users write
    def cached(self, shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
        return split(shape, heads)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        a, b = (torch.tanh(y.view(self.sizes(self, y, n))).flatten(-2) for y, n in zip((a, b), self.heads, strict=True))
        return self.head(torch.cat([a, b], -1))


TABLE = {"split": split}
SPLIT = functools.partial(split)


def by_table(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return TABLE["split"](x.shape, heads)


def by_partial(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return SPLIT(x.shape, heads)


def by_attribute(net: Net, x: Tensor, heads: int) -> tuple[int, ...]:
    return net.own(x.shape, heads)


FORMS = [by_function, by_shape, by_static_method, by_method, by_local, by_table, by_partial, by_attribute]
X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


def removed(net: nn.Module, ratio: Any = 0.5, output: str = "module") -> dict[str, Any]:
    return dict(graphprune.plan(net, X, ratio, output=output).removed)


@pytest.mark.parametrize("sizes", FORMS)
def test_the_same_plan_however_often_and_after_use(sizes: Any) -> None:
    net = Net(sizes).eval()
    first = removed(net)
    assert len(first["first.weight"][0]) == 12 and len(first["second.weight"][0]) == 12
    assert removed(net) == first
    net(X)
    assert removed(net) == first
    other = Net(sizes).eval()
    other(X)
    assert removed(other) == first
    assert removed(net, output="hybrid")["first.weight"] == first["first.weight"]


@pytest.mark.parametrize("sizes", FORMS)
def test_equal_sizes_of_two_layers_are_not_tied_together(sizes: Any) -> None:
    for ratio in ({"first": 0.5}, {"first": 0.25, "second": 0.75}, {"second": 0.5}):
        want = removed(Net(uncached).eval(), ratio)
        assert "first.weight" in want or "second.weight" in want
        assert removed(Net(sizes).eval(), ratio) == want


@pytest.mark.parametrize("sizes", FORMS)
def test_the_cache_answers_the_user_as_before(sizes: Any) -> None:
    net = Net(sizes).eval()
    want = net(X)
    graphprune.plan(net, X, 0.5)
    assert torch.equal(net(X), want)
    small = graphprune.prune(net, X, 0.5)
    assert small(X).shape == want.shape and torch.equal(net(X), want)


def test_numbers_are_plain_once_the_run_is_over() -> None:
    kept: list[Any] = []

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.layer = 4, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            kept.extend((self.width, x.shape[1], x.shape[1] // 2, self.width**-0.5))
            assert all(map(is_traced, kept[-4:]))
            return self.layer(x)

    record_run(Keeps(), torch.randn(2, 4))
    assert kept and isinstance(kept[0], TracedInt) and not any(map(is_traced, kept))
    assert all(origin_of(n) == Literal(n) for n in kept)
    assert type(kept[0] * 2) is int and type(kept[-1] + 1) is float and type(-kept[0]) is int
    assert {4: "found"}[kept[0]] == "found" and kept[0] == 4 and not vars(kept[0])


def test_sizes_find_what_dicts_hold() -> None:
    """A dict is no cache of a function: an equal key is found, in code that calls cached functions too."""
    table = {24: "wide", (2, 24): "pair"}
    found: list[Any] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 24), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            found.append((table[y.shape[-1]], y.shape[-1] in table, per_head(y.shape[-1], 4), table[x.shape[0], 24]))
            return self.head(y)

    record_run(Looks(), X)
    assert found[0] == ("wide", True, 6, "pair")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda n: per_head(n, 1), True),
        (lambda n: Widths.of((1, n), 1), True),
        (lambda n: {n: 1}[n], False),
        (lambda n: hash(n), False),
        (lambda n: len({n}), False),
    ],
)
def test_who_asks(call: Any, expected: bool) -> None:
    seen: list[bool] = []

    class Number(int):
        def __hash__(self) -> int:
            seen.append(serves_a_cache(sys._getframe(1)))
            return int.__hash__(self)

        def __floordiv__(self, other: Any) -> int:
            return 1

    call(Number(5))
    assert seen and all(answer == expected for answer in seen)
