"""The measurement itself: sessions of several models run in alternation."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import GraphPruneError
from ..support.progress import stage
from .arguments import FlatArguments
from .candidates import ModelFile
from .providers import Provider
from .results import BenchmarkRow, row_of
from .sessions import BoundSession, device_of, open_session, probe
from .statistics import calls_per_sample, schedule


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure; the fields are those of `benchmark`."""

    provider: Provider
    options: Mapping[str, str]
    threads: int
    cuda_graph: bool
    warmup: int
    rounds: int
    min_time: float
    seed: int


def measure_batch(
    files: Mapping[str, ModelFile],
    call: FlatArguments,
    baseline: str,
    settings: Settings,
    folder: Path,
) -> list[BenchmarkRow]:
    """All models at one batch size, each in a session of its own, measured in alternation."""
    sessions: dict[str, BoundSession] = {}
    nodes: dict[str, Mapping[str, int]] = {}
    device_id = device_of(settings.options)
    for name, file in files.items():
        try:
            found = probe(file.path, call, settings.provider, folder, provider_options=settings.options)
            session = open_session(
                file.path,
                settings.provider,
                threads=settings.threads,
                provider_options=settings.options,
                cuda_graph=settings.cuda_graph,
            )
            nodes[name] = found.nodes
            sessions[name] = BoundSession(session, call, settings.provider, device_id, outputs=found.outputs)
        except GraphPruneError as error:
            raise GraphPruneError(f"model {name!r}: {error}") from error
    names = list(files)
    label = "timing" if call.batch_size is None else f"timing batches of {call.batch_size}"
    with stage(label, settings.rounds, "rounds", still=True) as now:
        calls, samples = alternate([sessions[name].run for name in names], settings, now.advance)
    return [
        row_of(
            samples[i],
            samples[names.index(baseline)],
            seed=settings.seed,
            model=name,
            batch_size=call.batch_size,
            calls=calls[i],
            nodes=nodes[name],
            parameters=file.parameters,
            file_mib=file.size / 2**20,
            max_relative_error=file.error,
        )
        for i, (name, file) in enumerate(files.items())
    ]


def alternate(
    runs: Sequence[Callable[[], None]],
    settings: Settings,
    advance: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[int], list[list[float]]]:
    """Calls per sample, and seconds per call for each round, of each of `runs`."""
    for run in runs:
        for _ in range(settings.warmup):
            run()
    collecting = gc.isenabled()
    gc.disable()
    try:
        calls = [calls_per_sample(functools.partial(_seconds, run, 1, clock), settings.min_time) for run in runs]
        samples: list[list[float]] = [[] for _ in runs]
        for order in schedule(len(runs), settings.rounds, settings.seed):
            for i in order:
                samples[i].append(_seconds(runs[i], calls[i], clock) / calls[i])
            advance()
    finally:
        if collecting:
            gc.enable()
    return calls, samples


def _seconds(run: Callable[[], None], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start
