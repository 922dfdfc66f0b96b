"""Measuring samples: a function from samples to seconds, here with ONNX Runtime. Tests put another in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import GraphPruneError
from ...support.progress import stage, watched
from ..arguments import FlatArguments
from ..profiles import NodeTime, profile
from ..providers import CPU, Provider
from .kernels import Sample
from .subgraphs import subgraphs

# (seconds, and what the node of the sample looked like in the runtime, where that is known)
Reading = tuple[float, NodeTime | None]
Meter = Callable[[Sequence[Sample]], list[Reading]]
# Limits of one file: elements of weights, and work, so that a chunk is measured in a few seconds.
_ELEMENTS, _WORK, _COUNT = 6e7, 3e9, 200
_ROUNDS, _SHORT = 15, 1e7


def make_meter(provider: Provider, threads: int, options: dict[str, str]) -> Meter:
    """The meter of this machine: the runtime's own node times on the CPU; whole calls elsewhere, where the profiler
    sees only that work was handed to the device."""
    if provider.name == CPU:
        return lambda samples: _profiled(samples, provider, threads, options)
    return lambda samples: _called(samples, provider, threads, options)


def chunks(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of samples that go into one file, those of like work together."""
    out: list[list[int]] = []
    elements = work = 0.0
    for i in sorted(range(len(samples)), key=lambda i: samples[i].work):
        sample = samples[i]
        elements, work = elements + sample.weights, work + sample.work
        if not out or elements > _ELEMENTS or work > _WORK or len(out[-1]) >= _COUNT:
            out.append([])
            elements, work = float(sample.weights), float(sample.work)
        out[-1].append(i)
    return out


def _profiled(samples: Sequence[Sample], provider: Provider, threads: int, options: dict[str, str]) -> list[Reading]:
    out: list[Reading | None] = [None] * len(samples)
    with stage("timing", len(samples), "computations", still=True) as now:
        for chunk in chunks(samples):
            made = subgraphs([samples[i] for i in chunk])
            runs = _ROUNDS if max(samples[i].work for i in chunk) > _SHORT else 3 * _ROUNDS
            found = profile(made.model, made.feeds, provider, threads=threads, options=options, runs=runs)
            by_name = dict(zip(made.outputs, chunk, strict=True))
            for node in found.nodes:
                # layouts rename a node to its result and an ending
                i = by_name.get(node.name, by_name.get(node.name.partition("_")[0], -1))
                if i >= 0 and node.heavy:
                    out[i] = (node.seconds, node)
            now.advance(len(chunk))
    if any(reading is None for reading in out):
        raise GraphPruneError(
            "ONNX Runtime does not report the time of single nodes here: use another version, or bring a latency table"
        )
    return [reading for reading in out if reading is not None]


def _called(samples: Sequence[Sample], provider: Provider, threads: int, options: dict[str, str]) -> list[Reading]:
    """Seconds of a call of a session with one sample, inputs and outputs on the device."""
    import tempfile
    from pathlib import Path

    import torch

    from ..sessions import BoundSession, device_of, open_session

    out: list[Reading] = []
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = Path(folder) / "sample.onnx"
        for sample in watched(samples, "timing", len(samples), "computations", still=True):
            made = subgraphs([sample])
            path.write_bytes(made.model)
            session = open_session(path, provider, threads=threads, provider_options=options)
            given = FlatArguments.of({name: torch.from_numpy(value) for name, value in made.feeds.items()})
            bound = BoundSession(session, given, provider, device_of(options))
            times = []
            for _ in range(3 + 2 * _ROUNDS):
                start = time.perf_counter()
                bound.run()
                times.append(time.perf_counter() - start)
            out.append((float(np.median(times[3:])), None))
    return out
