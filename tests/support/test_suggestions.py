"""What was meant by a name that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from graphprune import GraphPruneError
from graphprune.support.suggestions import check_choice, did_you_mean, nearest

NAMES = ["", "stem", "layer1", "layer1.0", "layer1.0.conv1", "layer1.0.conv1.weight", "bn_scale", "Head", "l2"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("stm", "stem"), ("STEM", "stem"), ("head", "Head"), ("conv1", "layer1.0.conv1"), ("bn", "bn_scale"),
        ("layer1.0.cnov1", "layer1.0.conv1"), ("layer1.0.conv1.wieght", "layer1.0.conv1.weight"), ("L2", "l2"),
        ("weight", "layer1.0.conv1.weight"), ("xyzzy", None), ("", None), ("?", None), (3, None), ("s", None),
    ],
)  # fmt: skip
def test_nearest(name: Any, found: str | None) -> None:
    assert nearest(name, NAMES) == found
    assert did_you_mean(name, NAMES) == ("" if found is None else f"; did you mean {found!r}?")
    assert nearest(name, []) is None


@pytest.mark.parametrize(
    ("value", "known", "others", "message"),
    [
        ("gloabl", ("local", "global", "both"), "",
         "scope: expected one of 'local', 'global', 'both', got 'gloabl'; did you mean 'global'?"),
        (3, ("local", "global"), "", "scope: expected 'local' or 'global', got 3"),
        (None, ("local",), "", "scope: expected 'local', got None"),
        (["local"], ("local", None), "", "scope: expected 'local' or None, got ['local']"),
        ("x", ("a", "b"), "a function", "scope: expected 'a' or 'b', or a function, got 'x'"),
    ],
)  # fmt: skip
def test_choices(value: Any, known: tuple[Any, ...], others: str, message: str) -> None:
    with pytest.raises(GraphPruneError) as caught:
        check_choice("scope", value, known, others)
    assert str(caught.value) == message


def test_what_is_there_passes() -> None:
    check_choice("scope", "local", ("local", "global"))
    check_choice("scope", None, ("local", None))
    check_choice("scope", "local", {"local": 1})
