"""Ridge regression from moments against least squares on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from graphprune.importance.calibration import Moments
from graphprune.recovery.repair.solve import masked_ridge_solution, ridge_solution


def problem(rows: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments]:
    x, y = torch.randn(2, rows, 5).double(), torch.randn(2, rows, 3).double()
    start = torch.randn(2, 6, 3).double()
    moments = Moments(2, 5, 3)
    moments.add(x, y)
    return x, y, start, moments


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_against_stacked_least_squares(ridge: float, constant: bool) -> None:
    x, y, start, moments = problem()
    got = ridge_solution(moments, start, ridge, constant)
    for g in range(2):
        weight = (ridge * x[g].square().sum(0).mean()).sqrt()
        ones = torch.ones(len(x[g]), 1).double()
        design, wanted = torch.cat([x[g], ones], 1), y[g]
        if not constant:
            design, wanted = x[g], y[g] - start[g, -1]
        extra = torch.cat([torch.eye(5).double(), torch.zeros(5, 1).double()], 1)[:, : design.shape[1]] * weight
        stacked = torch.linalg.lstsq(torch.cat([design, extra]), torch.cat([wanted, start[g, :5] * weight])).solution
        torch.testing.assert_close(got[g, : len(stacked)], stacked)
        if not constant:
            assert torch.equal(got[g, -1], start[g, -1])
    direct = sum(float((torch.cat([x[g], torch.ones(60, 1)], 1) @ got[g] - y[g]).square().sum()) for g in range(2))
    assert moments.squared_error(got) == pytest.approx(direct, rel=1e-6)


def test_without_data_the_weights_stay() -> None:
    start = torch.randn(1, 4, 2).double()
    torch.testing.assert_close(ridge_solution(Moments(1, 3, 2), start, 1e-3, True), start)


def test_fewer_rows_than_features_stay_near_the_start() -> None:
    x, y, start, moments = problem(rows=2)
    got = ridge_solution(moments, start, 1e-6, True)
    z = torch.cat([x, torch.ones(2, 2, 1)], 2)
    torch.testing.assert_close(z @ got, y, rtol=1e-2, atol=1e-2)
    # what no row points at keeps its weights: the change lies in the span of the rows
    change = got - start
    features = x.mT @ torch.linalg.pinv(x.mT)
    torch.testing.assert_close(features @ change[:, :5], change[:, :5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.5])
def test_few_rows_are_fitted_as_their_sums_are(ridge: float, constant: bool) -> None:
    parts = [(torch.randn(2, n, 20).double(), torch.randn(2, n, 3).double()) for n in (3, 5)]
    start = torch.randn(2, 21, 3).double()
    few, summed = Moments(2, 20, 3), Moments(2, 20, 3)
    for part in parts:
        few.add(*part)
        summed.add(*part)
    assert summed.gram.shape == (2, 21, 21) and summed.few is None  # asked for
    assert few.few is not None and few.few[0].shape == (2, 8, 20)
    solutions = [ridge_solution(moments, start, ridge, constant) for moments in (few, summed)]
    torch.testing.assert_close(*solutions, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(few.variance, summed.variance)
    torch.testing.assert_close(few.missed(start), summed.missed(start))
    assert few.squared_error(start) == pytest.approx(summed.squared_error(start))
    assert few.few is not None
    few.add(*(torch.cat([a, b], 1) for a, b in zip(*parts, strict=True)))  # now there are too many
    assert few.few is None
    torch.testing.assert_close(few.gram, 2 * summed.gram)
    torch.testing.assert_close(few.cross, 2 * summed.cross)


@pytest.mark.parametrize("outputs_at_a_time", [1, 2, 100])
def test_masked_outputs_are_fits_over_their_free_entries(
    outputs_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.recovery.repair.solve._BATCH_BYTES", outputs_at_a_time * 2 * 8 * 36)
    x, y, start, moments = problem()
    free = torch.rand(2, 6, 3) < 0.6
    got = masked_ridge_solution(moments, start, 0.1, free)
    for g in range(2):
        pull = (0.1 * x[g].square().sum(0).mean()).sqrt()
        design = torch.cat([x[g], torch.ones(60, 1).double()], 1)
        for out in range(3):
            kept = free[g, :, out].nonzero()[:, 0]
            left = y[g, :, out] - design @ (start[g, :, out] * ~free[g, :, out])
            extra = torch.eye(6).double()[kept[kept < 5]][:, kept] * pull
            rows = torch.cat([design[:, kept], extra])
            right = torch.cat([left, start[g, kept[kept < 5], out] * pull])
            wanted = start[g, :, out].clone()
            wanted[kept] = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
            torch.testing.assert_close(got[g, :, out], wanted)


def test_all_entries_free_is_the_plain_fit() -> None:
    _, _, start, moments = problem()
    free = torch.ones(2, 6, 3, dtype=torch.bool)
    torch.testing.assert_close(
        masked_ridge_solution(moments, start, 1e-3, free), ridge_solution(moments, start, 1e-3, True)
    )


@pytest.mark.parametrize("rows", [7, 90])
def test_means_of_what_is_missed(rows: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, rows, 20), torch.randn(2, rows, 3)
    moments = Moments(2, 20, 3)
    moments.add(x[:, :4], y[:, :4])
    moments.add(x[:, 4:], y[:, 4:])
    weights = torch.randn(2, 21, 3, dtype=torch.float64)
    left = y.double() - x.double() @ weights[:, :-1] - weights[:, -1:]
    torch.testing.assert_close(moments.mean_missed(weights), left.mean(1), rtol=1e-5, atol=1e-6)
    assert moments.squared_error(weights) == pytest.approx(float(left.square().sum()), rel=1e-5)
