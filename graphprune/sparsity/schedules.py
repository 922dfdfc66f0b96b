"""Sparsity as a function of the training step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ..errors import GraphPruneError
from ..support.numbers import check_integer
from ..support.registry import Registry
from .ranking import check_sparsity

_CURVES: Registry[Callable[[float], float]] = Registry("schedule")
_CURVES.register("linear")(lambda p: p)
_CURVES.register("cubic")(lambda p: p * p * p)
# Also under the name of the paper (Zhu and Gupta, 2017) and that of libraries.
_CURVES.register("exponential", "zhu-gupta", "polynomial")(lambda p: 1 - (1 - p) * (1 - p) * (1 - p))
_CURVES.register("sinusoidal")(lambda p: (1 - math.cos(math.pi * p)) / 2)
_CURVES.register("one-shot")(lambda p: 1.0 if p > 0 else 0.0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The sparsity after a step; see `schedule`."""

    name: str
    initial: float
    final: float
    begin: int
    end: int
    frequency: int = 1

    def __call__(self, step: int) -> float:
        """The sparsity after `step` steps: `initial` up to `begin`, `final` from `end` on."""
        check_integer("step", step, 0)
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        done = (step - self.begin) // self.frequency * self.frequency
        part = _CURVES[self.name](done / (self.end - self.begin))
        return min(self.initial + (self.final - self.initial) * part, self.final)

    def updates(self) -> list[int]:
        """The steps, in order, at which the sparsity may change: `begin` + multiples of `frequency`, and `end`."""
        return [*range(self.begin + self.frequency, self.end, self.frequency), self.end]


def schedule(
    name: str,
    initial: float,
    final: float,
    steps: int,
    *,
    begin: int = 0,
    end: int | None = None,
    frequency: int = 1,
) -> Schedule:
    """A callable from the step to the sparsity: s(step) = initial + (final - initial) f(p).

    p = (step - begin) / (end - begin) is the progress; steps between two multiples of `frequency` count as the earlier.
    Both end points are exact, and the sparsity never falls.

    - "linear": p. "cubic": p³ (late). "exponential": 1 - (1 - p)³ (early). "sinusoidal": (1 - cos πp) / 2.
    - "one-shot": everything at the first step (the first multiple of `frequency`) after `begin`.
    - "zhu-gupta", also called "polynomial": s_f + (s_i - s_f) (1 - (t - t₀) / nΔt)³, Zhu and Gupta 2017, with
      t₀ = `begin` and Δt = `frequency`. It is the curve of "exponential".

    `initial` <= `final` lie in [0, 1). `steps`: how long it takes; nothing changes up to `begin` (default 0), and from
    `end` (default `steps`) on it is `final`; `frequency` is in steps.

    Raises GraphPruneError for an unknown name and numbers out of range.

    >>> import graphprune
    >>> s = graphprune.sparsity.schedule("linear", 0.0, 0.8, 4)
    >>> [s(step) for step in range(6)]
    [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 0.8]
    """
    key = name.lower().replace("_", "-").replace(" ", "-") if isinstance(name, str) else name
    _CURVES.find(key)
    low, high = check_sparsity(initial, "initial"), check_sparsity(final, "final")
    if low > high:
        raise GraphPruneError(f"schedule: the initial sparsity {low:g} is above the final one {high:g}")
    last = steps if end is None else end
    for what, value, least in (("steps", steps, 1), ("begin", begin, 0), ("end", last, 1), ("frequency", frequency, 1)):
        check_integer(f"schedule: {what}", value, least)
    if not begin < last <= steps:
        raise GraphPruneError(f"schedule: expected begin < end <= steps, got begin {begin}, end {last}, steps {steps}")
    return Schedule(key, low, high, begin, last, frequency)
