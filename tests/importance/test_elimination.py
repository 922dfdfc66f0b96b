"""Backward elimination against refitting from scratch at every step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from graphprune.importance import elimination as module
from graphprune.importance.elimination import Elimination, Problem, Quadratic, Thin, Whole


def matrix_of(quadratic: Quadratic) -> Tensor:
    if isinstance(quadratic, Whole):
        return quadratic.matrix
    assert isinstance(quadratic, Thin)
    return quadratic.rows.mT @ quadratic.rows + quadratic.ridge * torch.eye(quadratic.rows.shape[2]).double()


def make(problems: int, features: list[list[int]], others: int, outputs: int, rows: int = 0) -> Problem:
    """Units as given, and `others` features that never go; a thin matrix of so many rows."""
    total = sum(map(len, features)) + others
    mixed = torch.randn(total, total, dtype=torch.float64)
    x = torch.randn(problems, rows or 4 * total, total, dtype=torch.float64) @ mixed
    weights = torch.randn(problems, total, outputs, dtype=torch.float64)
    energy = 1.0 + float(torch.rand(()))
    ridge = 0.1 + torch.rand(problems, 1, 1, dtype=torch.float64)
    quadratic = Thin(x, ridge) if rows else Whole(x.mT @ x / x.shape[1])
    return Problem(quadratic, weights, torch.tensor(features), energy)


def refit(problem: Problem, weights: Tensor, gone: list[int]) -> tuple[Tensor, float]:
    """The best weights without the features of these units, and their error; small systems solved from scratch."""
    lost = set(problem.features[gone].flatten().tolist())
    keep = [i for i in range(weights.shape[1]) if i not in lost]
    best, error = torch.zeros_like(weights), 0.0
    for number, matrix in enumerate(matrix_of(problem.quadratic)):
        cross = matrix @ weights[number]
        best[number, keep] = torch.linalg.solve(matrix[keep][:, keep], cross[keep])
        missed = best[number] - weights[number]
        error += float((missed * (matrix @ missed)).sum())
    return best, error


def runs(start: int, stop: int, k: int) -> list[list[int]]:
    return [list(range(i, i + k)) for i in range(start, stop, k)]


CASES = [
    [make(1, [[0], [1], [2], [3], [4]], 0, 3)],
    [make(1, [[0], [1], [2], [3], [4], [5]], 0, 3, rows=3)],
    [make(1, runs(0, 12, 3), 2, 3)],
    [make(1, runs(2, 14, 3), 2, 3, rows=4)],
    [make(3, [[0, 1], [2, 3], [4, 5], [6, 7]], 1, 2)],
    [make(3, [[0, 1], [2, 3], [4, 5], [6, 7]], 1, 2, rows=2)],
    [make(1, [[0], [1], [2], [3]], 0, 3), make(1, [[5, 4], [2, 3], [1, 0], [7, 6]], 3, 2)],
    [make(1, [[0], [1], [2], [3]], 0, 3), make(1, [[5, 4], [2, 3], [1, 0], [7, 6]], 3, 2, rows=5)],
    [make(1, runs(0, 40, 1), 1, 3), make(1, runs(0, 80, 2), 0, 2, rows=20)],
]


@pytest.mark.parametrize("problems", CASES)
def test_each_step_removes_the_cheapest_at_its_price(
    problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 64)
    units = len(problems[0].features)
    order, costs = Elimination(problems, units).finish()
    assert sorted(order) == list(range(units))
    gone: list[int] = []
    before = 0.0
    for unit, cost in zip(order, costs, strict=True):
        left = [u for u in range(units) if u not in gone]
        prices = {u: sum(refit(p, p.weights, [*gone, u])[1] / p.energy for p in problems) - before for u in left}
        if len(prices) > 1:
            assert prices[unit] == pytest.approx(min(prices.values()), rel=1e-6)
        assert cost == pytest.approx(prices[unit], rel=1e-6)
        gone.append(unit)
        before += prices[unit]


@pytest.mark.parametrize("problems", [CASES[0], CASES[3], CASES[5], CASES[8]])
@pytest.mark.parametrize("part", [2, 3])
def test_what_goes_is_the_cheapest_of_those_that_were_cheap_at_first(
    problems: list[Problem], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, each step against problems solved from scratch."""
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr(module, "ALL", 1)
    units = len(problems[0].features)

    def error(gone: list[int]) -> float:
        return sum(refit(p, p.weights, gone)[1] / p.energy for p in problems)

    order, costs = Elimination(problems, units).finish()
    gone: list[int] = []
    while len(gone) < units - 1:
        left = [u for u in range(units) if u not in gone]
        first = error(gone)
        prices = {u: error([*gone, u]) - first for u in left}
        count = max(1, len(left) // part)
        among = sorted(left, key=prices.__getitem__)[: 2 * count if count > 1 else 1]
        for _ in range(count):
            before = error(gone)
            now = {u: error([*gone, u]) - before for u in among if u not in gone}
            unit = order[len(gone)]
            assert now[unit] == pytest.approx(min(now.values()), rel=1e-6)
            assert costs[len(gone)] == pytest.approx(now[unit], rel=1e-6)
            gone.append(unit)


@pytest.mark.parametrize("problems", CASES)
def test_weights_on_the_way_are_those_refitted_from_scratch(
    problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit in which errors count is that of the choice, and not of the weights."""
    monkeypatch.setattr(module, "PART", 64)
    units = len(problems[0].features)
    scales = [0.1 + torch.rand(len(p.weights), 1, p.weights.shape[2]).double() for p in problems]
    scaled = [dataclasses.replace(p, weights=p.weights * s) for p, s in zip(problems, scales, strict=True)]
    given = [dataclasses.replace(p, scale=s) for p, s in zip(problems, scales, strict=True)]
    stepwise, whole = Elimination(given, units), Elimination(scaled, units)
    for gone in {0, 1, units // 2, units - 1}:
        stepwise.until(gone)
        assert len(stepwise.order) == gone
        for problem, change in zip(problems, stepwise.refits(), strict=True):
            weights = problem.weights
            torch.testing.assert_close(weights + change, refit(problem, weights, stepwise.order)[0])
    order, costs = stepwise.finish()
    assert order == whole.finish()[0]
    assert costs == pytest.approx(whole.finish()[1], rel=1e-6)


def test_thin_and_whole_are_the_same_matrix() -> None:
    thin = make(2, runs(0, 60, 3), 4, 5, rows=11)
    whole = Problem(Whole(matrix_of(thin.quadratic)), thin.weights, thin.features, thin.energy)
    torch.testing.assert_close(thin.quadratic.times(thin.weights), whole.quadratic.times(thin.weights))
    (order, costs), (other, prices) = (Elimination([p], 20).finish() for p in (thin, whole))
    assert order == other
    assert costs == pytest.approx(prices, rel=1e-6)


def test_large_groups_lose_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(1, [[i] for i in range(12)], 0, 3)
    single = Elimination([problem], 12).finish()[0]
    monkeypatch.setattr(module, "SHARE", 4)
    order, costs = Elimination([problem], 12).finish()
    assert sorted(order) == list(range(12)) and all(math.isfinite(c) for c in costs)
    first = {u: refit(problem, problem.weights, [u])[1] for u in range(12)}
    assert order[:3] == sorted(first, key=first.__getitem__)[:3]
    assert single[0] == order[0]


@pytest.mark.parametrize("rows", [0, 3])
def test_weights_of_doubled_inputs(rows: int) -> None:
    """Of two inputs that are the same one goes for nothing, whatever rounding does to a nearly singular matrix."""
    problem = make(1, [[i] for i in range(8)], 0, 3, rows=rows)
    if isinstance(problem.quadratic, Thin):
        problem.quadratic.rows[:, :, 5] = problem.quadratic.rows[:, :, 2]
        problem.quadratic.ridge.fill_(1e-12)
    else:
        matrix = matrix_of(problem.quadratic)
        matrix[:, 5], matrix[:, :, 5] = matrix[:, 2], matrix[:, :, 2]
        matrix[:, 5, 5] = matrix[:, 2, 2]
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + 1e-13)
    order, costs = Elimination([problem], 8).finish()
    assert all(math.isfinite(c) for c in costs)
    if not rows:
        assert order[0] in (2, 5) and abs(costs[0]) < 1e-6


@pytest.mark.parametrize("problems", [CASES[3], CASES[8]])
def test_weights_in_their_own_precision(problems: list[Problem]) -> None:
    units = len(problems[0].features)
    narrow = [dataclasses.replace(p, weights=p.weights.float()) for p in problems]
    order, costs = Elimination(problems, units).finish()
    found, prices = Elimination(narrow, units).finish()
    assert found == order
    assert prices == pytest.approx(costs, rel=1e-3)
    half = Elimination(narrow, units)
    half.until(units // 2)
    for problem, change in zip(narrow, half.refits(), strict=True):
        assert change.dtype == torch.float32
        wanted = refit(problem, problem.weights.double(), half.order)[0]
        torch.testing.assert_close((problem.weights + change).double(), wanted, rtol=1e-3, atol=1e-3)
