from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune import GraphPruneError, sparsity

# The closed forms, written a second time.
FORMULAS = {
    "linear": lambda p: p,
    "cubic": lambda p: p**3,
    "exponential": lambda p: 1 - (1 - p) ** 3,
    "sinusoidal": lambda p: (1 - math.cos(math.pi * p)) / 2,
    "one-shot": lambda p: float(p > 0),
    "zhu-gupta": lambda p: 1 - (1 - p) ** 3,
    "polynomial": lambda p: 1 - (1 - p) ** 3,
}
names = st.sampled_from(sorted(FORMULAS))
fractions = st.floats(0, 1, exclude_max=True)


@given(names, fractions, fractions, st.integers(1, 300), st.data())
def test_closed_forms_end_points_and_monotony(name: str, a: float, b: float, steps: int, data: st.DataObject) -> None:
    low, high = sorted((a, b))
    end = data.draw(st.integers(1, steps))
    begin = data.draw(st.integers(0, end - 1))
    frequency = data.draw(st.integers(1, steps))
    s = sparsity.schedule(name, low, high, steps, begin=begin, end=end, frequency=frequency)
    found = [s(step) for step in range(steps + 3)]
    assert all(value == low for value in found[: begin + 1])
    assert all(value == high for value in found[end:])
    assert found == sorted(found)
    for step in range(begin, end):
        p = (step - begin) // frequency * frequency / (end - begin)
        assert found[step] == pytest.approx(low + (high - low) * FORMULAS[name](p), abs=1e-12)
    changes = {step for step in range(1, steps + 3) if found[step] != found[step - 1]}
    assert changes <= set(s.updates()) and s.updates() == sorted(set(s.updates()))


def test_zhu_gupta_as_in_the_paper() -> None:
    initial, final, begin, n, delta = 0.1, 0.9, 20, 8, 5
    s = sparsity.schedule("Zhu_Gupta", initial, final, 100, begin=begin, end=begin + n * delta, frequency=delta)
    for k in range(n + 1):
        t = begin + k * delta
        paper = final + (initial - final) * (1 - (t - begin) / (n * delta)) ** 3
        assert [s(t + late) for late in range(delta)] == pytest.approx([paper] * delta)


def test_one_shot_jumps_at_the_first_step() -> None:
    s = sparsity.schedule("one-shot", 0.0, 0.7, 10, begin=2)
    assert [s(i) for i in range(5)] == [0.0, 0.0, 0.0, 0.7, 0.7]


def test_errors() -> None:
    for arguments, options, message in (
        (("quadratic", 0, 0.5, 10), {}, r"unknown schedule 'quadratic'.*Known: linear, cubic"),
        (("liner", 0, 0.5, 10), {}, "did you mean 'linear'"),
        ((None, 0, 0.5, 10), {}, "unknown schedule None"),
        (("linear", 0, 1.0, 10), {}, r"final: expected a number in \[0, 1\)"),
        (("linear", -1, 0.5, 10), {}, "initial: expected"),
        (("linear", 0.6, 0.5, 10), {}, "initial sparsity 0.6 is above the final one 0.5"),
        (("linear", 0, 0.5, 0), {}, "steps: expected an integer of at least 1"),
        (("linear", 0, 0.5, 10), {"begin": 10}, "expected begin < end <= steps"),
        (("linear", 0, 0.5, 10), {"end": 11}, "expected begin < end <= steps"),
        (("linear", 0, 0.5, 10), {"frequency": 0}, "frequency: expected"),
    ):
        with pytest.raises(GraphPruneError, match=message):
            sparsity.schedule(*arguments, **options)  # type: ignore[arg-type]
    for step in (-1, 0.5, True):
        with pytest.raises(GraphPruneError, match="step: expected an integer of at least 0"):
            sparsity.schedule("linear", 0, 0.5, 10)(step)  # type: ignore[arg-type]
