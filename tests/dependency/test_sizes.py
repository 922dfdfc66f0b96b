"""Sizes in the user's code: what the solver says, against trying every value of every attribute."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.dependency.sizes import SizeSolver
from graphprune.plans.surgery import operate
from tests import oracles

WIDTH = 6


class Sized(nn.Module):
    """Six hidden features, numbers of its own, and code that uses them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], numbers: dict[str, int]) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), body
        self.names = tuple(numbers)
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.body(self, self.a(x)))


def halves_swapped(m: Any, y: Tensor) -> Tensor:
    return torch.cat([y[:, : m.half], torch.relu(y[:, m.half :])], 1)


def asserted(m: Any, y: Tensor) -> Tensor:
    assert y.shape[1] == m.width
    return torch.relu(y)


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, int]]] = {
    "one": (lambda m, y: y.view(y.shape[0], m.width, 1).relu().view(y.shape[0], m.width), {"width": WIDTH}),
    "literal": (lambda m, y: y.view(y.shape[0], 6, 1).relu().flatten(1), {}),
    "own size": (lambda m, y: y.view(y.shape[0], y.shape[1], 1).relu().flatten(1), {}),
    "twice the half": (lambda m, y: y.view(y.shape[0], 2 * m.half, 1).relu().flatten(1), {"half": 3}),
    "one less": (lambda m, y: y.view(y.shape[0], m.less + 1, 1).relu().flatten(1), {"less": 5}),
    "slice": (halves_swapped, {"half": 3}),
    "comparison": (asserted, {"width": WIDTH}),
    "two names": (
        lambda m, y: y.view(y.shape[0], m.first, 1).relu().view(y.shape[0], m.second),
        {"first": WIDTH, "second": WIDTH},
    ),
    "product": (lambda m, y: y.view(y.shape[0], m.rows * m.columns, 1).relu().flatten(1), {"rows": 2, "columns": 3}),
    "quotient": (lambda m, y: y.view(y.shape[0], m.doubled // m.two, 1).relu().flatten(1), {"doubled": 12, "two": 2}),
    "product and one": (
        lambda m, y: y.view(y.shape[0], m.rows * m.columns, 1).relu().view(y.shape[0], m.columns + 3),
        {"rows": 2, "columns": 3},
    ),
    "split": (lambda m, y: torch.cat(y.split([m.left, m.right], 1)[::-1], 1), {"left": 2, "right": 4}),
}


def removed_by(graph: graphprune.DependencyGraph, gone: np.ndarray) -> dict[str, dict[int, tuple[int, ...]]]:
    out: dict[str, dict[int, tuple[int, ...]]] = {}
    for group in graph.groups:
        for member in group.members:
            lost = member.positions[gone[graph.units(group)]].reshape(-1)
            if len(lost):
                axes = out.setdefault(member.parameter, {})
                axes[member.axis] = tuple(sorted({*axes.get(member.axis, ()), *map(int, lost)}))
    return out


def works(model: nn.Module, removed: Any, values: dict[str, int], x: Tensor) -> bool:
    """Does the cut network with these numbers run and equal the one with zeroed slices?"""
    small = operate(model, removed, [("", n, (), v) for n, v in values.items()], (), ())
    try:
        found = oracles.double_copy(small)(x.double())
    except (RuntimeError, AssertionError):
        return False
    return oracles.relative_error(found, oracles.zero_reference(model, removed)(x.double())) < 1e-9


def attempts(case: str, numbers: dict[str, int]) -> Iterator[dict[str, int]]:
    """All values of all numbers; of the factors of a product one changes and the others stay what they are."""
    for values in itertools.product(range(1, 2 * WIDTH + 1), repeat=len(numbers)):
        new = dict(zip(numbers, values, strict=True))
        if "product" not in case or sum(new[name] != numbers[name] for name in numbers) == 1:
            yield new


@pytest.mark.parametrize("case", CASES)
def test_solutions_are_right_and_conflicts_have_none(case: str) -> None:
    body, numbers = CASES[case]
    model, x = Sized(body, numbers), torch.randn(2, 3)
    graph = graphprune.trace(model, x)
    units = np.concatenate([graph.units(g) for g in graph.groups]) if graph.groups else np.zeros(0, np.int64)
    if case == "literal":
        assert not len(units) and "the literal 6" in graph.explain("a.weight")
        return
    solved = 0
    for count in range(1, len(units)):
        for chosen in itertools.combinations(units, count):
            gone = np.zeros(int(graph.analysis.label.max()) + 1, bool)
            gone[list(chosen)] = True
            removed = removed_by(graph, gone)
            resolution = SizeSolver(graph.analysis, gone).resolve()
            if resolution.conflicts:
                # nothing that could have been said makes it right, and somebody is blamed
                assert not any(works(model, removed, values, x) for values in attempts(case, numbers))
                assert all(c.text and c.axis_map for c in resolution.conflicts)
                assert all(c.wanted is None or 0 <= c.wanted <= c.length for c in resolution.conflicts)
            else:
                solved += 1
                values = {a.name: v for a, v in resolution.attributes.items()}
                assert values.keys() <= numbers.keys()
                assert works(model, removed, values, x)
    assert solved or not len(units)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.7])
def test_whole_plans_come_out_right(case: str, ratio: float) -> None:
    body, numbers = CASES[case]
    model, x = Sized(body, numbers), torch.randn(2, 3)
    plan = graphprune.plan(model, x, ratio)
    small = plan.apply(copy.deepcopy(model))
    assert graphprune.verify(model, small, plan, x).passed
    assert not plan.removed or case != "literal"
    # five is no multiple of two or three: six stay
    assert plan.removed or case in ("literal", "twice the half") or "product" in case
    assert small(torch.randn(5, 3)).shape == (5, 2)  # another batch size


def test_a_width_moves_to_what_the_code_asks_for() -> None:
    def body(m: Any, y: Tensor) -> Tensor:
        if y.shape[1] % 2:
            raise ValueError("an even width, please")
        return torch.relu(y)

    model, x = Sized(body, {}), torch.randn(2, 3)
    for ratio in (0.17, 0.5, 0.8):  # asks for 5, 3 and 1
        assert graphprune.prune(model, x, ratio).a.out_features % 2 == 0
