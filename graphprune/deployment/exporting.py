"""`export`: the file of any runtime and precision, compared with the model before it gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..runtimes.adapters import Adapter, adapter
from ..runtimes.adapters.features import cpu_features
from ..runtimes.adapters.source import Source
from ..runtimes.adapters.workers import RemoteSession, Worker
from ..runtimes.sources import Sources
from ..runtimes.turns import time_by_turns, typical
from ..support.doors import door
from ..support.files import check_target, put_in_place, workspace
from ..support.numbers import check_integer, check_number
from ..support.progress import ProgressOption, reported, stage
from ..support.types import PathLike
from .artifact import Artifact
from .calibrating import check_data, write_calibration
from .comparing import compare
from .runner import Runner

Evaluate = Callable[[Runner], Any]
_WARMUP, _SECONDS = 3, 0.01


@door("model", exact=True)
@reported("export")
def export(
    model: nn.Module,
    example_input: Any,
    path: PathLike,
    runtime: str = "onnxruntime",
    precision: str = "fp32",
    *,
    data: Any = None,
    samples: int = 300,
    evaluate: Evaluate | None = None,
    dynamic_batch: bool = True,
    provider: str | None = None,
    threads: int = 1,
    rounds: int = 15,
    check: bool = True,
    tolerance: float | None = None,
    python: PathLike | None = None,
    seed: int = 0,
    progress: ProgressOption = None,
) -> Artifact:
    """Write the file that a runtime takes, run it there, and say what it computes, weighs and takes.

    The file is written and run in a process of its own, so that what a runtime's libraries do (print, set threads, die)
    stays there; outputs are compared with the model's in float32. Until all that has passed the files lie in a
    temporary folder beside `path`; after an error nothing is left behind, and files that were already there are
    untouched. The model is exported in eval mode; its training flags and the random state are as before.

    Args:
        model: in float32. Precisions are made by the runtime.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        path: its ending is the runtime's: .onnx, .xml (OpenVINO), .pte (ExecuTorch), .tflite (LiteRT), .ncnn.param,
            .mnn, .pt2 (torch, inductor). What belongs to it is written beside it (`Artifact.files`).
        runtime: one of those that `graphprune.runtimes.usable_runtimes()` lists.
        precision: "fp32", "bf16", "fp16" or "int8". Which are offered depends on the runtime; why others are not is
            said in the error.
        data: calibration inputs for int8: a DataLoader, batches or a tensor, without labels or with (then they are not
            looked at), or `graphprune.Synthetic(n)`, which makes them from the model.
        samples: how many of them are used at most.
        evaluate: called with a `Runner`, which takes what the model takes and runs the file; what it returns, such as
            an accuracy, is in the result.
        dynamic_batch: the first axis of what shares the batch stays free where the runtime can have it so
            (`Artifact.any_batch`), as in `export_onnx`.
        provider: execution provider of ONNX Runtime: "cpu" (default), "cuda" or "tensorrt"; None elsewhere.
        threads: that it is run with.
        rounds: samples of the latency; 0 to measure none.
        check: compare with the model. False also for what cannot be run here.
        tolerance: largest relative error, max|runtime - torch| / max|torch| of each output; None: the runtime's for
            this precision (mostly 1e-4, 1e-2 in fp16, 5e-2 in bf16). In int8 nothing is refused unless a number is
            given.
        python: an interpreter with graphprune and the runtime, where its packages cannot share this environment.
        seed: of the order of measurements.
        progress: as in `graphprune.plan`.

    Raises:
        GraphPruneError: an unknown runtime or precision, or one that is not offered; packages that are missing (with
            the line that installs them); int8 without data; a path that cannot be written or has another ending; a
            model that cannot be captured, or has an operator that the runtime does not take; outputs that differ.
    """
    chosen = adapter(runtime)
    chosen.check_precision(precision, provider if chosen.providers else None)
    target = check_target(path)
    chosen.check_path(target)
    _check_settings(chosen, precision, data, evaluate, provider, samples, threads, rounds, tolerance)
    allowed = tolerance if tolerance is not None else chosen.tolerances.get(precision)
    with workspace(target) as folder, Worker(runtime, python=python, threads=threads) as worker:
        described = worker.check(precision)
        sources = Sources(model, example_input, folder)
        if precision == "int8":
            with stage("reading data"):
                sources.calibration = write_calibration(
                    data, sources.model, sources.arguments, samples, folder / "calibration"
                )
        source = sources.source(chosen, dynamic_batch)
        files, notes = _write(source, precision, chosen, worker, folder / "made" / target.name)
        found = Found()
        if check or evaluate is not None or rounds:
            with stage(f"opening in {chosen.title}"):
                session = worker.open(
                    files[-1], source.inputs, sources.arguments.tensors, precision=precision, provider=provider
                )
            found = _look(
                session, sources, chosen, allowed=allowed, check=check, evaluate=evaluate, rounds=rounds,
                threads=threads, seed=seed, on_cpu=provider in (None, "cpu"),
            )  # fmt: skip
        size = sum(file.stat().st_size for file in files)
        final = _put_in_place(files, target.parent)
    return Artifact(
        path=target,
        files=final,
        runtime=runtime,
        precision=precision,
        layout=described["layout"],
        versions=described["versions"],
        features=cpu_features(),
        inputs=source.inputs,
        outputs=source.outputs,
        batch_size=sources.arguments.batch_size,
        any_batch=source.any_batch,
        size=size,
        in_force=found.in_force,
        max_relative_error=found.largest,
        relative_error=found.squares,
        tolerance=allowed,
        evaluation=found.evaluation,
        latency_ms=found.latency_ms,
        clock=found.clock,
        rounds=rounds,
        threads=threads,
        notes=(*notes, *found.notes),
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """What running the file showed; the fields are those of `Artifact`."""

    in_force: str = ""
    largest: float | None = None
    squares: float | None = None
    evaluation: Any = None
    latency_ms: float | None = None
    clock: str = "wall"
    notes: tuple[str, ...] = ()


def _write(
    source: Source, precision: str, chosen: Adapter, worker: Worker, path: Path
) -> tuple[tuple[Path, ...], list[str]]:
    """The files that the runtime wrote, the one that is named last, and its notes."""
    path.parent.mkdir()
    with stage(f"writing for {chosen.title}"):
        notes = worker.write(source, precision, path)
    files = chosen.files(path)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise GraphPruneError(f"{chosen.title} wrote no {', '.join(missing)}")
    return files, notes


def _look(
    session: RemoteSession,
    sources: Sources,
    chosen: Adapter,
    *,
    allowed: float | None,
    check: bool,
    evaluate: Evaluate | None,
    rounds: int,
    threads: int,
    seed: int,
    on_cpu: bool,
) -> Found:
    """Compare, evaluate and time, as far as asked for."""
    found = Found(in_force=session.in_force)
    if check:
        largest, squares = compare(session, sources.arguments.tensors, sources.answers, allowed, chosen.title)
        found = dataclasses.replace(found, largest=largest, squares=squares)
    if evaluate is not None:
        with stage("evaluating"):
            value = evaluate(Runner(session, sources.arguments, sources.answers))
        found = dataclasses.replace(found, evaluation=value)
    if rounds:
        with stage("timing", rounds, "rounds", still=True) as now:
            timing = time_by_turns(
                [session], warmup=_WARMUP, rounds=rounds, min_time=_SECONDS, threads=threads, seed=seed,
                on_cpu=on_cpu, advance=now.advance,
            )  # fmt: skip
        latency = 1000 * typical(timing.samples[0], timing.clock)
        notes = (timing.why,) if timing.why else ()
        found = dataclasses.replace(found, latency_ms=latency, clock=timing.clock, notes=notes)
    return found


def _check_settings(
    chosen: Adapter,
    precision: str,
    data: Any,
    evaluate: Any,
    provider: str | None,
    samples: int,
    threads: int,
    rounds: int,
    tolerance: float | None,
) -> None:
    check_integer("threads", threads, 1)
    check_integer("rounds", rounds, 0)
    check_number("tolerance", tolerance, optional=True)
    check_data(data, samples, (precision,))
    if evaluate is not None and not callable(evaluate):
        raise GraphPruneError(f"evaluate: expected a function of a Runner, got {type(evaluate).__name__}")
    if provider is not None and not chosen.providers:
        raise GraphPruneError(f"provider: {chosen.name} has no execution providers; leave it out")


def _put_in_place(files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Rename files of a workspace, the one that is named last at last; those that were there come back on an error."""
    finals = tuple(folder / file.name for file in files)
    with _kept(finals[:-1], files[-1].parent / "kept"):
        for file, final in zip(files, finals, strict=True):
            put_in_place(file, final)
    return finals


@contextlib.contextmanager
def _kept(finals: Sequence[Path], folder: Path) -> Iterator[None]:
    """Files of these names are as they were after an error."""
    folder.mkdir()
    before = {final: folder / final.name for final in finals if final.exists()}
    for final, copy in before.items():
        copy.hardlink_to(final)
    try:
        yield
    except BaseException:
        for final in finals:
            if final in before:
                before[final].replace(final)
            else:
                final.unlink(missing_ok=True)
        raise
