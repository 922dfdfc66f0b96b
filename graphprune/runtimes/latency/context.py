"""What a whole network's run adds to the times of its single computations: measured on the network itself, dense."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..profiles import Profile
from .kernels import Kernel, Sample
from .meters import Meter

# Seconds that calling a node takes beside the node itself.
_NODE = 2e-6


@dataclasses.dataclass(frozen=True)
class Context:
    """How the run of one network relates to the table.

    `wall`: seconds of a call of the dense network. `light`: of that, what grows with the number of elements: nodes
    without convolutions or products, changes of layout included. `fixed`: what is the same at every width, such as
    calling the nodes. `factors`: for computations at their full lengths, time within the network over time alone;
    `other`: the same for those that were not recognised in the run. What all this is longer or shorter than `wall` (the
    profiler's own work; threads that wait for each other) is shared out in proportion.
    """

    wall: float
    light: float
    fixed: float
    factors: Mapping[Sample, float]
    other: float

    def factor(self, sample: Sample) -> float:
        return self.factors.get(sample, self.other)

    def to_dict(self) -> dict[str, Any]:
        factors = [[str(s.kernel), list(s.lengths), f] for s, f in self.factors.items()]
        numbers = {"wall": self.wall, "light": self.light, "fixed": self.fixed, "other": self.other}
        return {**numbers, "factors": factors}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Context:
        numbers = [found[name] for name in ("wall", "light", "fixed", "other")]
        factors = {Sample(Kernel.parse(k), tuple(int(n) for n in at)): float(f) for k, at, f in found["factors"]}
        for value in (*numbers, *factors.values()):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{value!r} is no time")
        return cls(numbers[0], numbers[1], numbers[2], factors, numbers[3])


def make_context(run: Profile, samples: Sequence[Sample], meter: Meter, alone: Mapping[Sample, float]) -> Context:
    """Compare the nodes of a run with the same computations alone.

    `samples`: the network's computations at their full lengths, one entry per call. `alone`: their times in the table.
    """
    unique = list(dict.fromkeys(samples))
    readings = dict(zip(unique, meter(unique), strict=True))
    inside: dict[Any, list[float]] = defaultdict(list)
    for node in run.nodes:
        if node.heavy:
            inside[node.signature].append(node.seconds)
    calls: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        alike = readings[sample][1]
        if alike is not None and alike.signature in inside:
            calls[alike.signature].append(sample)
    factors: dict[Sample, float] = {}
    for signature, matched in calls.items():
        mean = float(np.mean(inside[signature]))
        for sample in matched:
            factors[sample] = mean / alone[sample]
    rest_inside = sum(sum(times) for signature, times in inside.items() if signature not in calls)
    rest_alone = sum(alone[s] for s in samples if s not in factors)
    known = sum(factors[s] * alone[s] for s in samples if s in factors)
    heavy = sum(sum(times) for times in inside.values())
    other = (heavy - known if rest_inside else 0.0) / rest_alone if rest_alone else 1.0
    if rest_alone and other <= 0:
        other = 1.0
    light = float(sum(n.seconds for n in run.nodes if not n.heavy and not n.idle))
    total = sum(n.seconds for n in run.nodes)
    if not total:  # a device whose profiler does not time nodes
        everything = sum(alone[s] for s in samples)
        fixed = min(_NODE * len(samples), run.wall)
        return Context(run.wall, 0.0, fixed, {}, (run.wall - fixed) / everything if everything else 1.0)
    idle = sum(n.seconds for n in run.nodes if n.idle)
    fixed = min(idle + _NODE * len(run.nodes), max(0.0, run.wall - heavy - light))
    return Context(run.wall, light, fixed, factors, other)
