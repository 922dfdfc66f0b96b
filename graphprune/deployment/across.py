"""One table over runtimes and precisions: a worker for each runtime, models timed by turns within each cell."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GraphPruneError
from ..runtimes.adapters import PRECISIONS, Adapter, adapter
from ..runtimes.adapters.features import cpu_features
from ..runtimes.adapters.workers import RemoteSession, Worker
from ..runtimes.arguments import FlatArguments
from ..runtimes.candidates import Model
from ..runtimes.comparison import check_measuring, check_models, sizes_of
from ..runtimes.listing import usable_runtimes
from ..runtimes.machine import describe_machine, describe_versions, usable_cores
from ..runtimes.providers import Provider, resolve_provider
from ..runtimes.results import BenchmarkReport, BenchmarkRow, row_of
from ..runtimes.turns import Timing, time_by_turns
from ..support.progress import stage, watched
from ..support.suggestions import check_choice
from ..support.types import PathLike
from .calibrating import check_data
from .cells import Made, Models


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured and how; as in `benchmark`. `runtimes`: name -> interpreter, None for this one."""

    runtimes: Mapping[str, PathLike | None]
    precisions: tuple[str, ...]
    data: Any
    samples: int
    provider: Provider
    threads: int
    warmup: int
    rounds: int
    min_time: float
    check: bool
    seed: int

    @classmethod
    def of(
        cls,
        runtimes: str | Sequence[str] | Mapping[str, PathLike | None] | None,
        precisions: str | Sequence[str] | None,
        *,
        data: Any,
        samples: int,
        provider: str | Provider,
        **measuring: Any,
    ) -> Asked:
        """Raises GraphPruneError for an unknown runtime or precision, a setting out of range, int8 without data."""
        check_measuring(*(measuring[name] for name in ("threads", "warmup", "rounds", "min_time", "seed")))
        wanted = _precisions(precisions)
        check_data(data, samples, wanted)
        return cls(
            runtimes=_runtimes(runtimes), precisions=wanted, data=data, samples=samples,
            provider=resolve_provider(provider), **measuring,
        )  # fmt: skip


def compare_runtimes(
    models: Mapping[str, Model],
    example_input: Any,
    asked: Asked,
    *,
    batch_sizes: Sequence[int] | int | None,
    baseline: str | None,
) -> BenchmarkReport:
    """See `graphprune.benchmark`."""
    first = check_models(models, baseline)
    sizes = sizes_of(batch_sizes, FlatArguments.of(example_input))
    notes = [f"{asked.threads} threads share {usable_cores()} cores"] if asked.threads > usable_cores() else []
    notes += [asked.provider.note] if asked.provider.note and "onnxruntime" in asked.runtimes else []
    cells = [(runtime, precision) for runtime in asked.runtimes for precision in asked.precisions]
    rows: list[BenchmarkRow] = []
    versions = dict(describe_versions())
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        made = Models(models, example_input, sizes, Path(name), asked.data, asked.samples, first)
        for runtime, precision in watched(cells, "measuring", len(cells), "cells"):
            try:
                with _Cell(adapter(runtime), precision, made, first, asked) as cell:
                    for size in sizes:
                        rows.extend(cell.rows(size))
                    versions.update(cell.versions)
                notes.extend(note for note in cell.notes if note not in notes)
            except GraphPruneError as error:
                if len(cells) == 1:
                    raise
                rows = [row for row in rows if (row.runtime, row.precision) != (runtime, precision)]
                notes.append(f"{runtime} in {precision} is left out: {error}")
    if not rows:
        raise GraphPruneError("nothing could be measured: " + "; ".join(notes))
    return BenchmarkReport(
        rows=tuple(rows),
        baseline=first,
        provider=asked.provider.name if "onnxruntime" in asked.runtimes else "CPU",
        provider_options={},
        threads=asked.threads,
        cuda_graph=False,
        warmup=asked.warmup,
        rounds=asked.rounds,
        min_time=asked.min_time,
        seed=asked.seed,
        machine={**describe_machine(asked.provider), "features": list(cpu_features())},
        versions=versions,
        notes=tuple(notes),
    )


class _Cell:
    """One runtime and precision, with its worker."""

    def __init__(self, chosen: Adapter, precision: str, models: Models, baseline: str, asked: Asked) -> None:
        self._provider = asked.provider.name if chosen.providers else None
        chosen.check_precision(precision, self._provider)
        self._adapter, self._precision, self._models = chosen, precision, models
        self._baseline, self._asked = baseline, asked
        self._worker = Worker(chosen.name, python=asked.runtimes[chosen.name], threads=asked.threads)
        self.notes: list[str] = []

    def __enter__(self) -> _Cell:
        self._worker.__enter__()
        try:
            self.versions: Mapping[str, str] = self._worker.check(self._precision)["versions"]
        except BaseException as error:
            self._worker.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._worker.__exit__(*error)

    def rows(self, size: int | None) -> Iterator[BenchmarkRow]:
        """All models at one batch size."""
        asked, where = self._asked, f"{self._adapter.name} {self._precision}"
        files: dict[str, Made] = {}
        sessions: dict[str, RemoteSession] = {}
        for name in self._models.names:
            try:
                files[name] = made = self._models.made(name, size, self._adapter, self._precision, self._worker)
                sessions[name] = self._worker.open(
                    made.path, made.names, made.tensors, precision=self._precision, provider=self._provider
                )
                if asked.check:
                    made.compare(sessions[name], self._adapter, self._precision)
            except GraphPruneError as error:
                raise GraphPruneError(f"model {name!r}: {error}") from error
            self.notes.extend(f"{name!r} in {where}: {note}" for note in made.notes)
        label = f"timing in {where}" + ("" if size is None else f", batches of {size}")
        with stage(label, asked.rounds, "rounds", still=True) as now:
            timing = time_by_turns(
                list(sessions.values()), warmup=asked.warmup, rounds=asked.rounds, min_time=asked.min_time,
                threads=asked.threads, seed=asked.seed,
                on_cpu=self._provider is None or asked.provider.device == "cpu",
                advance=now.advance,
            )  # fmt: skip
        if timing.why:
            self.notes.append(f"{where}: {timing.why}")
        yield from self._rows(size, files, sessions, timing)
        for session in sessions.values():
            session.close()

    def _rows(
        self, size: int | None, files: Mapping[str, Made], sessions: Mapping[str, RemoteSession], timing: Timing
    ) -> Iterator[BenchmarkRow]:
        names = list(files)
        compared = timing.samples[names.index(self._baseline)]
        for i, (name, made) in enumerate(files.items()):
            yield row_of(
                timing.samples[i],
                compared,
                seed=self._asked.seed,
                clock=timing.clock,
                model=name,
                batch_size=size,
                calls=timing.calls[i],
                nodes={},
                parameters=made.parameters,
                file_mib=made.size / 2**20,
                max_relative_error=made.error,
                runtime=self._adapter.name,
                precision=self._precision,
                in_force=sessions[name].in_force,
            )


def _precisions(given: str | Sequence[str] | None) -> tuple[str, ...]:
    named = ("fp32",) if given is None else (given,) if isinstance(given, str) else tuple(given)
    if not named or len(set(named)) != len(named):
        raise GraphPruneError(f"precisions: expected some of {', '.join(PRECISIONS)}, each once, got {list(named)}")
    for name in named:
        check_choice("precisions", name, PRECISIONS)
    return named


def _runtimes(given: str | Sequence[str] | Mapping[str, PathLike | None] | None) -> dict[str, PathLike | None]:
    if given is None:
        return {"onnxruntime": None}
    if given == "all":
        return dict.fromkeys(usable_runtimes().usable)
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        listed = [given] if isinstance(given, str) else list(given)
        if len(set(listed)) != len(listed):
            raise GraphPruneError(f"runtimes has an entry twice: {listed}")
        named = dict.fromkeys(listed)
    if not named:
        raise GraphPruneError("runtimes is empty; name some, or pass 'all' for those that are usable here")
    for name, python in named.items():
        adapter(name)
        if python is not None and not isinstance(python, (str, os.PathLike)):
            raise GraphPruneError(f"runtimes[{name!r}]: expected the path of a Python interpreter, got {python!r}")
    return named
