from __future__ import annotations

from typing import Any, cast

import pytest

from graphprune.runtimes.turns import time_by_turns, typical


class Clocked:
    """A session whose times are given: on the wall and of the process, for one call."""

    def __init__(self, *pairs: tuple[float, float]) -> None:
        self._pairs, self._turn, self.calls = pairs, 0, list[int]()

    def sample(self, calls: int) -> tuple[float, float]:
        self.calls.append(calls)
        self._turn += 1
        return self._pairs[self._turn % len(self._pairs)]


def timed(*sessions: Clocked, **changes: Any) -> Any:
    settings = {"warmup": 2, "rounds": 8, "min_time": 0.1, "threads": 1, "seed": 0, **changes}
    return time_by_turns(cast(Any, list(sessions)), **settings)


def test_an_idle_machine_is_read_from_the_wall() -> None:
    found = timed(Clocked((0.02, 0.0199)), Clocked((0.01, 0.01)))
    assert found.clock == "wall" and not found.why
    assert found.samples == ((0.02,) * 8, (0.01,) * 8) and found.calls == (5, 10)


def test_one_thread_of_a_busy_machine_is_read_from_its_own_time() -> None:
    found = timed(Clocked((0.05, 0.02)), Clocked((0.03, 0.01)))
    assert found.clock == "cpu" and "others use the CPU" in found.why
    assert found.samples == ((0.02,) * 8, (0.01,) * 8)


def test_a_single_hiccup_that_hits_one_of_them_counts() -> None:
    assert timed(Clocked((0.02, 0.02)), *[Clocked((0.02, 0.02))] * 3).clock == "wall"
    assert timed(Clocked((0.02, 0.02), (0.02, 0.02), (0.5, 0.02))).clock == "cpu"


def test_several_threads_on_a_busy_machine_are_compared_by_their_fastest() -> None:
    found = timed(Clocked((0.02, 0.04), (0.03, 0.06), (0.04, 0.08)), threads=2)
    assert found.clock == "wall, fastest" and "fastest samples" in found.why
    assert typical(found.samples[0], found.clock) == 0.02
    assert timed(Clocked((0.02, 0.04)), threads=2).clock == "wall"


def test_a_gpu_is_read_from_the_wall() -> None:
    assert timed(Clocked((0.02, 0.001)), on_cpu=False).clock == "wall"


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_medians_stand_for_the_others(clock: str) -> None:
    assert typical([3.0, 1.0, 2.0], clock) == 2.0
