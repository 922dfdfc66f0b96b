"""Latency of several models in ONNX Runtime, measured so that their ratio can be believed."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..support.doors import door
from ..support.progress import ProgressOption, reported
from ..support.suggestions import did_you_mean
from ..support.unwrapping import checked_model, no_model
from .arguments import FlatArguments
from .candidates import Candidates, Model
from .machine import describe_machine, describe_versions, usable_cores
from .measure import Settings, measure_batch
from .providers import CPU, Provider, resolve_provider
from .results import BenchmarkReport, BenchmarkRow
from .sessions import device_of


@door()
@reported("benchmark")
def benchmark(
    models: Mapping[str, Model],
    example_input: Any,
    *,
    provider: str | Provider = "auto",
    threads: int = 1,
    batch_sizes: Sequence[int] | int | None = None,
    warmup: int = 5,
    rounds: int = 30,
    min_time: float = 0.01,
    baseline: str | None = None,
    provider_options: Mapping[str, Any] | None = None,
    cuda_graph: bool = False,
    opset: int | None = None,
    check: bool = True,
    seed: int = 0,
    progress: ProgressOption = None,
) -> BenchmarkReport:
    """Measure the latency of `models` in ONNX Runtime, alternated in one process.

    Modules are exported by `export_onnx` to a temporary folder (with a dynamic batch; where that fails, one file per
    batch size, and a note). In every round each model is measured once, in an order shuffled anew, so that whatever
    slows the machine down for a while slows all models alike. Inputs and outputs stay on the provider's device. A
    sample is the mean over as many calls in a row as take `min_time`; medians, percentiles and the interval of the
    speed-up are over the samples of all rounds.

    Takes about len(models) x len(batch_sizes) x rounds x max(min_time, latency) seconds, and the exports before.

    Args:
        models: name -> module, or path of an ONNX file.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments. Files get the
            tensors by the names of their inputs where these are known, else by position.
        provider: "auto" (CUDA if it really loads, else the CPU, see `notes`), "cpu", "cuda" or a full name. That
            it is the one that runs is asserted; nodes that it lacks run on the CPU and are counted.
        threads: inside a node; nodes run one after the other.
        batch_sizes: one or several; that of the example if None.
        warmup: calls of each model before anything is measured.
        rounds: samples per model and batch size, at least 2.
        min_time: seconds that one sample lasts at least; 0 for single calls.
        baseline: the name of the model that others are compared with; the first if None.
        provider_options: options of the provider, such as {"device_id": 1}.
        cuda_graph: capture each model in a CUDA graph and replay it (CUDA only; every node must run on the GPU).
        opset, check: as in `export_onnx`; `check` compares each export with its module.
        seed: of the order of measurements, the bootstrap and the rows of enlarged batches.
        progress: as in `graphprune.plan`. Nothing is drawn while something is timed.

    Raises:
        GraphPruneError: no models, an unknown baseline, a setting out of range, a provider that is not usable, a
            module that cannot be exported, a file that cannot be run with this input or at this batch size.
    """
    first = _check_models(models, baseline)
    settings = _settings(provider, provider_options, threads, cuda_graph, warmup, rounds, min_time, seed)
    arguments = FlatArguments.of(example_input)
    sizes = _sizes(batch_sizes, arguments)
    notes = [settings.provider.note] if settings.provider.note else []
    if threads > usable_cores():
        notes.append(f"{threads} threads share {usable_cores()} cores")
    rows: list[BenchmarkRow] = []
    with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
        folder = Path(name)
        files = Candidates(models, example_input, sizes, folder, opset=opset, check=check)
        for size in sizes:
            call = arguments if size is None else arguments.resized(size, seed)
            rows.extend(measure_batch(files.at(size), call, first, settings, folder))
        notes.extend(files.notes)
    notes.extend(_elsewhere(rows, settings.provider))
    return BenchmarkReport(
        rows=tuple(rows),
        baseline=first,
        provider=settings.provider.name,
        provider_options=settings.options,
        threads=threads,
        cuda_graph=cuda_graph,
        warmup=warmup,
        rounds=rounds,
        min_time=min_time,
        seed=seed,
        machine=describe_machine(settings.provider, device_of(provider_options)),
        versions=describe_versions(),
        notes=tuple(notes),
    )


def _elsewhere(rows: Sequence[BenchmarkRow], provider: Provider) -> Iterator[str]:
    """Notes on models that do not run on the provider alone."""
    for name, row in {row.model: row for row in rows}.items():
        share = row.share_on(provider.name)
        if share < 1:
            others = ", ".join(f"{count} on {other}" for other, count in row.nodes.items() if other != provider.name)
            yield f"{name!r} runs {100 * share:.0f} % of its nodes on {provider.name} ({others})"


def _check_models(models: Mapping[str, Model], baseline: str | None) -> str:
    """The name of the baseline."""
    if not isinstance(models, Mapping) or not models:
        raise GraphPruneError("models: expected at least one entry, {name: module or path of an ONNX file}")
    for name, model in models.items():
        if not isinstance(name, str) or not name:
            raise GraphPruneError(f"models: a name must be a string that is not empty, got {name!r}")
        if not isinstance(model, (nn.Module, str, os.PathLike)):
            raise no_model(model, f"models[{name!r}]", "a torch.nn.Module or the path of an ONNX file")
        if isinstance(model, nn.Module):
            checked_model(model, f"models[{name!r}]")
    if baseline is not None and baseline not in models:
        hint = did_you_mean(baseline, models)
        raise GraphPruneError(f"baseline {baseline!r} is not among the models: {', '.join(models)}{hint}")
    return next(iter(models)) if baseline is None else baseline


def _settings(
    provider: str | Provider,
    provider_options: Mapping[str, Any] | None,
    threads: int,
    cuda_graph: bool,
    warmup: int,
    rounds: int,
    min_time: float,
    seed: int,
) -> Settings:
    for name, value, least in (("threads", threads, 1), ("warmup", warmup, 0), ("rounds", rounds, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GraphPruneError(f"{name} must be an integer of at least {least}, got {value!r}")
    if isinstance(min_time, bool) or not isinstance(min_time, (int, float)) or not 0 <= min_time < math.inf:
        raise GraphPruneError(f"min_time must be a number of seconds of at least 0, got {min_time!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise GraphPruneError(f"seed must be an integer of at least 0, got {seed!r}")
    chosen = resolve_provider(provider)
    if cuda_graph and chosen.device != "cuda":
        reason = chosen.note or f"{chosen.name} was asked for"
        raise GraphPruneError(f"cuda_graph needs the CUDA provider, but {reason}")
    options = {str(key): str(value) for key, value in (provider_options or {}).items()}
    if options and chosen.name == CPU:
        raise GraphPruneError(f"provider_options: {CPU} has no options, got {', '.join(options)}")
    device_of(options)
    return Settings(chosen, options, threads, cuda_graph, warmup, rounds, float(min_time), seed)


def _sizes(batch_sizes: Sequence[int] | int | None, arguments: FlatArguments) -> list[int | None]:
    if batch_sizes is None:
        return [arguments.batch_size]
    asked = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not asked:
        raise GraphPruneError("batch_sizes is empty; pass None for the batch size of the example")
    if len(set(asked)) != len(asked):
        raise GraphPruneError(f"batch_sizes has an entry twice: {asked}")
    # Fails where the example cannot be resized, before anything is exported.
    return [arguments.resized(size).batch_size for size in asked]
