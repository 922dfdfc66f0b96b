"""Files of several models in one runtime, timed by turns in its worker."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from statistics import median

from .adapters.workers import RemoteSession
from .results import FASTEST
from .statistics import calls_per_sample, schedule

# A process that computes on one thread should have as much CPU time as passes on the wall. What is over says that
# others took its place.
_CONTENDED = 1.05
_WALL, _CPU = "wall", "cpu"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples of several sessions, in seconds per call; `calls` in each. `clock`: what was read, and `why`."""

    samples: tuple[tuple[float, ...], ...]
    calls: tuple[int, ...]
    clock: str
    why: str


def time_by_turns(
    sessions: Sequence[RemoteSession],
    *,
    warmup: int,
    rounds: int,
    min_time: float,
    threads: int,
    seed: int,
    on_cpu: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Timing:
    """Each session once in every round, in an order shuffled anew; what is read is chosen by what was measured.

    On one thread of a CPU that others use too, the time on the wall is mostly theirs: then the worker's own CPU time is
    taken. With several threads, whose CPU time says nothing of latency, or on a GPU, the time on the wall; where its
    samples scatter, the fastest ones stand for it (`Timing.clock`).
    """
    for session in sessions:
        if warmup:
            session.sample(warmup)
    calls = [calls_per_sample(functools.partial(_on_wall, session), min_time) for session in sessions]
    wall: list[list[float]] = [[] for _ in sessions]
    cpu: list[list[float]] = [[] for _ in sessions]
    for order in schedule(len(sessions), rounds, seed):
        for i in order:
            on_wall, own = sessions[i].sample(calls[i])
            wall[i].append(on_wall)
            cpu[i].append(own)
        advance()
    taken, clock, why = _chosen(wall, cpu, threads, on_cpu)
    return Timing(tuple(map(tuple, taken)), tuple(calls), clock, why)


def _on_wall(session: RemoteSession) -> float:
    return session.sample(1)[0]


def _chosen(
    wall: list[list[float]], cpu: list[list[float]], threads: int, on_cpu: bool
) -> tuple[list[list[float]], str, str]:
    pairs = [pair for i in range(len(wall)) for pair in zip(wall[i], cpu[i], strict=True)]
    shares = [on_wall / max(own, 1e-9) for on_wall, own in pairs]
    waiting = median(shares)
    if on_cpu and threads == 1:
        if waiting <= _CONTENDED and max(shares) < 2:
            return wall, _WALL, ""
        return cpu, _CPU, (
            f"others use the CPU (the clock on the wall ran {100 * (waiting - 1):.0f} % longer than this process did), "
            f"so times are CPU time of the process"
        )
    scatter = max(median(samples) / min(samples) for samples in wall)
    if scatter <= 1.25:
        return wall, _WALL, ""
    return wall, FASTEST, (
        f"the machine is busy (the median sample took {100 * (scatter - 1):.0f} % longer than the fastest), so the "
        f"fastest samples are compared"
    )


def typical(samples: Sequence[float], clock: str) -> float:
    """The sample that stands for all."""
    return min(samples) if clock == FASTEST else median(samples)
