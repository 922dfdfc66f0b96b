"""Latency of several models in ONNX Runtime, measured so that their ratio can be believed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import GraphPruneError
from ..support.numbers import check_integer, check_number
from ..support.suggestions import did_you_mean
from ..support.unwrapping import checked_model, no_model
from .arguments import FlatArguments
from .candidates import Candidates, Model
from .machine import describe_machine, describe_versions, usable_cores
from .measure import Settings, measure_batch
from .providers import CPU, Provider, resolve_provider
from .results import BenchmarkReport, BenchmarkRow
from .sessions import device_of


def compare_in_onnxruntime(
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
) -> BenchmarkReport:
    """Modules and ONNX files alternated in this process, with what ONNX Runtime alone can say of them.

    Arguments, result and errors are those of `graphprune.benchmark`, which describes them.
    """
    first = check_models(models, baseline)
    settings = _settings(provider, provider_options, threads, cuda_graph, warmup, rounds, min_time, seed)
    arguments = FlatArguments.of(example_input)
    sizes = sizes_of(batch_sizes, arguments)
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


def check_models(models: Mapping[str, Model], baseline: str | None) -> str:
    """The name of the baseline. Raises GraphPruneError for what is neither a module nor a path, or no such name."""
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
    check_measuring(threads, warmup, rounds, min_time, seed)
    chosen = resolve_provider(provider)
    if cuda_graph and chosen.device != "cuda":
        reason = chosen.note or f"{chosen.name} was asked for"
        raise GraphPruneError(f"cuda_graph needs the CUDA provider, but {reason}")
    options = {str(key): str(value) for key, value in (provider_options or {}).items()}
    if options and chosen.name == CPU:
        raise GraphPruneError(f"provider_options: {CPU} has no options, got {', '.join(options)}")
    device_of(options)
    return Settings(chosen, options, threads, cuda_graph, warmup, rounds, float(min_time), seed)


def check_measuring(threads: int, warmup: int, rounds: int, min_time: float, seed: int) -> None:
    """Raise GraphPruneError for a setting out of range."""
    for name, value, least in (("threads", threads, 1), ("warmup", warmup, 0), ("rounds", rounds, 2)):
        check_integer(name, value, least)
    check_number("min_time", min_time)
    check_integer("seed", seed, 0)


def sizes_of(batch_sizes: Sequence[int] | int | None, arguments: FlatArguments) -> list[int | None]:
    """Batch sizes to measure. Raises GraphPruneError where the example cannot have one of them."""
    if batch_sizes is None:
        return [arguments.batch_size]
    asked = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
    if not asked:
        raise GraphPruneError("batch_sizes is empty; pass None for the batch size of the example")
    if len(set(asked)) != len(asked):
        raise GraphPruneError(f"batch_sizes has an entry twice: {asked}")
    # Fails where the example cannot be resized, before anything is exported.
    return [arguments.resized(size).batch_size for size in asked]
