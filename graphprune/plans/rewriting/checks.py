"""What recorded graphs call besides torch: the training flag, and checks that a call is like the recorded one."""

from __future__ import annotations

import operator
from typing import Any

from ...errors import GraphPruneError

__all__ = ["choose", "expect_comparison", "expect_length", "expect_value"]

_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))


def choose(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """One of two values, by the training flag."""
    return in_training if training else in_evaluation


def expect_value(value: Any, recorded: Any, name: str) -> None:
    """An argument that is no tensor must be what it was when the module was recorded."""
    if value is not recorded and (type(value) is not type(recorded) or value != recorded):
        raise GraphPruneError(
            f"this module was recorded with {name}={recorded!r} and got {_shown(value)}; prune it with an example "
            f"input that passes what you need, or with output='module'"
        )


def expect_length(value: Any, recorded: int, name: str) -> None:
    """The code took a fixed number of items from this."""
    if len(value) != recorded:
        raise GraphPruneError(f"this module was recorded with {recorded} items in {name} and got {len(value)}")


def expect_comparison(comparison: str, left: Any, right: Any, recorded: bool, text: str) -> None:
    """A comparison of sizes must turn out as recorded: otherwise the code would have taken another branch."""
    if comparison not in _COMPARISONS:
        raise GraphPruneError(f"not a plan: {comparison!r} is no comparison")
    if bool(getattr(operator, comparison)(left, right)) != recorded:
        raise GraphPruneError(
            f"this module was recorded where {text} was {recorded}, and is called where it is {not recorded}: its code "
            f"would do something else there. Prune it with an example input of that size, or with output='module'"
        )


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
