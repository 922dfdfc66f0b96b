from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphprune.runtimes.parity import default_tolerance, exact_float32, relative_error

nan, inf = math.nan, math.inf


def test_relative_error_is_that_of_the_largest_value() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        shape = tuple(generator.integers(1, 5, size=3))
        b = generator.normal(size=shape)
        a = b + generator.normal(size=shape) * 1e-3
        worst = max(abs(p - q) for p, q in zip(a.ravel(), b.ravel(), strict=True))
        expected = worst / max(abs(q) for q in b.ravel())
        assert relative_error(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([0.1, 0.0], [0.0, 0.0], 0.1),
        ([], [], 0.0),
        ([1.0, nan], [1.0, nan], 0.0),
        ([1.0, nan], [1.0, 2.0], inf),
        ([1.0, 2.0], [1.0, nan], inf),
        ([inf, 1.0], [inf, 1.0], 0.0),
        ([inf, 1.0], [-inf, 1.0], inf),
        ([inf, 1.0], [nan, 1.0], inf),
        ([nan], [nan], 0.0),
        ([1.0], [1.0, 1.0], inf),
    ],
)
def test_relative_error_of_special_values(actual: list[float], expected: list[float], error: float) -> None:
    found = relative_error(torch.tensor(actual), torch.tensor(expected))
    assert found == pytest.approx(error, rel=1e-6)


def test_integers_and_booleans_are_compared_exactly() -> None:
    assert relative_error(torch.tensor([1000000]), torch.tensor([1000000])) == 0
    assert relative_error(torch.tensor([1000000]), torch.tensor([1000001])) == inf
    assert relative_error(torch.tensor([True]), torch.tensor([False])) == inf
    assert relative_error(torch.tensor([1]), torch.tensor([1], dtype=torch.int32)) == inf
    assert relative_error(torch.tensor([1.0]), torch.tensor([1])) == inf


def test_tolerance_follows_the_coarsest_dtype() -> None:
    assert default_tolerance([torch.ones(1), torch.ones(1, dtype=torch.long)]) == 1e-4
    assert default_tolerance([torch.ones(1), torch.ones(1, dtype=torch.float16)]) == 1e-2
    assert default_tolerance([torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.bfloat16)]) == 5e-2
    assert default_tolerance([]) == 1e-4


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no setting per operator")
def test_exact_float32_is_temporary() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), exact_float32():
        assert conv.fp32_precision == "ieee" and torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert before == (conv.fp32_precision, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
