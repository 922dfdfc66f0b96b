"""One set of words for numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graphprune import GraphPruneError
from graphprune.support.numbers import check_integer, check_number


@pytest.mark.parametrize("value", [1, 5, 2**70])
def test_integers_pass(value: int) -> None:
    check_integer("n", value, 1)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, math.nan])
def test_what_is_no_integer_of_that_size_is_named(value: Any) -> None:
    with pytest.raises(GraphPruneError, match=r"^n: expected an integer of at least 1, got "):
        check_integer("n", value, 1)


@pytest.mark.parametrize(
    ("value", "options"),
    [(0, {}), (0.5, {"high": 1}), (1, {"high": 1}), (1e-9, {"above": True}), (None, {"optional": True})],
)
def test_numbers_pass(value: Any, options: dict[str, Any]) -> None:
    check_number("rate", value, **options)


@pytest.mark.parametrize(
    ("value", "options", "limit"),
    [
        (-1e-9, {}, "of at least 0"),
        (math.inf, {}, "of at least 0"),
        (math.nan, {}, "of at least 0"),
        (True, {}, "of at least 0"),
        ("1", {}, "of at least 0"),
        (None, {}, "of at least 0"),
        (0, {"above": True}, "above 0"),
        (1.5, {"high": 1}, r"in \[0, 1\]"),
        (0.0, {"high": 1, "above": True}, r"in \(0, 1\]"),
        (-1, {"optional": True}, "of at least 0 or None"),
    ],
)
def test_what_is_no_such_number_is_named(value: Any, options: dict[str, Any], limit: str) -> None:
    with pytest.raises(GraphPruneError, match=f"^rate: expected a number {limit}, got "):
        check_number("rate", value, **options)
