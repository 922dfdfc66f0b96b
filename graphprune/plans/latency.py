"""What was asked, predicted and measured about the latency of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import GraphPruneError
from .fields import number, table, whole


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One plan on the way, in milliseconds: the limit it was made for, the prediction for it (corrected by the attempts
    before), and what was measured (None where nothing was)."""

    limit_ms: float
    predicted_ms: float
    measured_ms: float | None


@dataclasses.dataclass(frozen=True)
class Latency:
    """The latency of a plan. `requested_ms`: the budget; `dense_ms`: the dense network, on average over the
    measurements. `attempts`: in order. `chosen`: which of them became the plan. `about`: the target."""

    requested_ms: float
    dense_ms: float
    attempts: tuple[Attempt, ...]
    chosen: int
    about: Mapping[str, Any]

    @property
    def predicted_ms(self) -> float:
        return self.attempts[self.chosen].predicted_ms

    @property
    def measured_ms(self) -> float | None:
        return self.attempts[self.chosen].measured_ms

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        measured = self.measured_ms
        return None if measured is None else self.predicted_ms / measured - 1

    def __str__(self) -> str:
        text = f"latency: {self.dense_ms:.3g} ms dense, {self.requested_ms:.3g} ms asked for, "
        text += f"{self.predicted_ms:.3g} ms predicted"
        if self.measured_ms is None or self.error is None:
            return text + ", not measured"
        where = f"{self.about.get('provider', '?')}, {self.about.get('threads', '?')} threads"
        return (
            f"{text}, {self.measured_ms:.3g} ms measured ({self.dense_ms / self.measured_ms:.2f}x faster; prediction "
            f"{self.error:+.1%}; attempt {self.chosen + 1} of {len(self.attempts)}; {where})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "about": dict(self.about)}

    @classmethod
    def from_dict(cls, found: Any) -> Latency:
        """The inverse of `to_dict`. Raises GraphPruneError, KeyError, TypeError or ValueError for anything else."""
        attempts = tuple(
            Attempt(
                _time(a["limit_ms"]), _time(a["predicted_ms"]), None if (m := a["measured_ms"]) is None else _time(m)
            )
            for a in found["attempts"]
        )
        chosen = whole(found["chosen"])
        if not 0 <= chosen < len(attempts):
            raise GraphPruneError("not a plan: its latency names an attempt that is not there")
        about = dict(table(found["about"]))
        return cls(_time(found["requested_ms"]), _time(found["dense_ms"]), attempts, chosen, about)


def _time(value: Any) -> float:
    if number(value) < 0:
        raise ValueError(f"{value!r} is no time")
    return number(value)
