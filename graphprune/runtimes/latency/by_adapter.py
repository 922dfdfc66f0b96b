"""Any runtime and precision: computations and whole networks are written by its adapter and timed in its worker.

Where a runtime times its nodes, many computations share a file and the nodes are read. Elsewhere each has a file of its
own, and what is the same for every call is taken off.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GraphPruneError
from ...support.progress import stage, watched
from ...support.types import PathLike
from ..adapters import Adapter, adapter
from ..adapters.features import cpu_features
from ..adapters.source import Source, write_batches
from ..adapters.workers import RemoteSession, Worker
from ..machine import describe_machine
from ..profiles import Profile
from ..providers import CPU, Provider, resolve_provider
from ..sources import Sources
from ..turns import time_by_turns, typical
from .chains import chain_file
from .kernels import Sample
from .meters import Reading, chunks
from .modules import chain_module, sample_module, tiny_module
from .rig import Bench, Rig
from .subgraphs import Subgraphs, subgraphs

# How a computation is called, alone or among what it was fused with or made into.
_NAMED = re.compile(r"(?:^|,)y(\d+)(?!\d)")
# Runs under the eyes of a profiler; warm-up, rounds and least seconds of a sample of single computations, of chains
# and of networks.
_RUNS = 30
_ALONE, _CHAINS, _NETWORKS = (3, 9, 2e-4), (2, 8, 1e-3), (5, 40, 0.01)


class AdapterRig(Rig):
    """See `Rig`. `provider`: as in `Target`; `python`: the interpreter of another environment.

    Raises GraphPruneError for an unknown runtime, a precision that it does not have here, a package that is missing.
    """

    def __init__(
        self, runtime: str, precision: str, provider: str, threads: int, python: PathLike | None = None
    ) -> None:
        self.adapter = adapter(runtime)
        self.provider = _provider_of(self.adapter, precision, provider)
        self.adapter.check_precision(precision, self.provider.name if self.adapter.providers else None)
        self.precision, self.threads = precision, threads
        self.worker = Worker(runtime, python=python, threads=threads)
        self._stack = contextlib.ExitStack()
        self._tells = self.adapter.form == "onnx"  # for all we know
        self._overhead: float | None = None
        self._chains: dict[str, list[RemoteSession]] = {}

    def __enter__(self) -> AdapterRig:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.worker)
            versions = self.worker.check(self.precision)["versions"]
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphprune-")))
            self._stack = stack.pop_all()
        self.about = {
            "runtime": self.adapter.name, "precision": self.precision, "provider": self.provider.name,
            "threads": self.threads, "options": {}, **describe_machine(self.provider),
            "features": list(cpu_features()), **versions,
        }  # fmt: skip
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def bench(self, model: nn.Module, example: Any) -> Bench:
        return AdapterBench(self, model, example)

    def meter(self, samples: Sequence[Sample]) -> list[Reading]:
        found = self._by_node(samples)
        rest = [i for i in range(len(samples)) if i not in found]
        found.update(zip(rest, self._by_call([samples[i] for i in rest]), strict=True))
        return [found[i] for i in range(len(samples))]

    def chain_meter(self, kind: str, widths: Sequence[int]) -> list[float]:
        """See `Rig`. Files are written once and stay open."""
        if kind not in self._chains:
            made = watched(widths, f"writing {kind}", len(widths), "widths", still=True)
            self._chains[kind] = [self._opened(self._chain(kind, int(width))) for width in made]
        return self.seconds(self._chains[kind], *_CHAINS, fastest=True)

    def seconds(
        self, sessions: Sequence[RemoteSession], warmup: int, rounds: int, least: float, fastest: bool = False
    ) -> list[float]:
        """What a call of each takes, timed by turns."""
        with stage("timing", rounds, "rounds", still=True) as now:
            found = time_by_turns(
                sessions, warmup=warmup, rounds=rounds, min_time=least, threads=self.threads, seed=0,
                on_cpu=self.provider.device == "cpu", advance=now.advance,
            )  # fmt: skip
        return [min(samples) if fastest else typical(samples, found.clock) for samples in found.samples]

    @property
    def settings(self) -> dict[str, Any]:
        """How files are opened."""
        return {"precision": self.precision, "provider": self.provider.name if self.adapter.providers else None}

    def write(self, source: Source) -> Path:
        """The artifact of a source, in a folder of its own."""
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"model{self.adapter.suffix}"
        self.worker.write(source, self.precision, path)
        return path

    def _by_node(self, samples: Sequence[Sample]) -> dict[int, Reading]:
        """Of those that are found among the nodes that the runtime times."""
        out: dict[int, Reading] = {}
        if not self._tells:
            return out
        with stage("timing", len(samples), "computations", still=True) as now:
            for chunk in chunks(samples):
                source = self._source(subgraphs([samples[i] for i in chunk]), None)
                nodes = self.worker.nodes(
                    self.write(source), source.inputs, source.tensors, runs=_RUNS, **self.settings
                )  # fmt: skip
                self._tells = bool(nodes)
                if not nodes:
                    break
                for node in nodes:
                    named = _NAMED.search(node.name)
                    if node.heavy and named is not None:
                        out[chunk[int(named[1])]] = (node.seconds, node)
                now.advance(len(chunk))
        return out

    def _by_call(self, samples: Sequence[Sample]) -> list[Reading]:
        if samples and self._overhead is None:
            session = self._opened(self._source(None, tiny_module()))
            self._overhead = self.seconds([session], *_ALONE, fastest=True)[0]
            session.close()
        found: list[Reading] = []
        for sample in watched(samples, "timing", len(samples), "computations", still=True):
            session = self._opened(self._source(subgraphs([sample]), sample_module(sample)))
            taken = self.seconds([session], *_ALONE, fastest=True)[0]
            session.close()
            found.append((max(taken - (self._overhead or 0.0), 0.05 * taken), None))
        return found

    def _chain(self, kind: str, width: int) -> Source:
        model, feeds, result = chain_file(kind, width)
        return self._source(Subgraphs(model, feeds, [result]), chain_module(kind, width))

    def _source(self, made: Subgraphs | None, program: tuple[nn.Module, tuple[Tensor, ...]] | None) -> Source:
        """Of an ONNX file and of a module that computes the same, whichever the adapter reads."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        if self.adapter.form == "onnx" and made is not None:
            tensors = tuple(torch.from_numpy(value) for value in made.feeds.values())
            (folder / "model.onnx").write_bytes(made.model)
            example = write_batches(folder / "example", [tensors])
            return Source(
                inputs=tuple(made.feeds), outputs=tuple(made.outputs), example=example, onnx=folder / "model.onnx",
                calibration=example,
            )  # fmt: skip
        assert program is not None
        module, tensors = program
        sources = Sources(module, tensors, folder, check=False)
        sources.calibration = write_batches(folder / "calibration", [tensors])
        return sources.source(self.adapter, any_batch=False)

    def _opened(self, source: Source) -> RemoteSession:
        return self.worker.open(self.write(source), source.inputs, source.tensors, **self.settings)


class AdapterBench(Bench):
    """See `Bench`. Candidates are quantised with the example alone, as what they take does not depend on ranges."""

    def __init__(self, rig: AdapterRig, model: nn.Module, example: Any) -> None:
        self.rig, self.example = rig, example
        self._source = self._made(model)
        self._dense = rig.write(self._source)
        self._session = self._open(self._dense)

    def close(self) -> None:
        self._session.close()

    def profile(self) -> Profile:
        rig, source = self.rig, self._source
        nodes = rig.worker.nodes(self._dense, source.inputs, source.tensors, runs=_RUNS, **rig.settings)
        return Profile(nodes, min(rig.seconds([self._session], *_NETWORKS)[0] for _ in range(2)))

    def compare(self, small: nn.Module) -> tuple[float, float]:
        session = self._open(self.rig.write(self._made(small)))
        try:
            dense, pruned = self.rig.seconds([self._session, session], *_NETWORKS)
        finally:
            session.close()
        return dense, pruned

    def _made(self, model: nn.Module) -> Source:
        folder = Path(tempfile.mkdtemp(dir=self.rig.folder))
        sources = Sources(model, self.example, folder, check=False)
        sources.calibration = write_batches(folder / "calibration", [sources.arguments.tensors])
        return sources.source(self.rig.adapter, any_batch=False)

    def _open(self, path: Path) -> RemoteSession:
        source = self._source
        return self.rig.worker.open(path, source.inputs, source.tensors, **self.rig.settings)


def _provider_of(chosen: Adapter, precision: str, provider: str) -> Provider:
    """Where it runs: "auto" is the CPU but for precisions that this runtime has on GPUs alone."""
    named = provider.lower()
    if named == "auto":
        on_cpu = chosen.why_refused(precision, "cpu") is None
        return Provider(CPU) if on_cpu or not chosen.providers else resolve_provider("auto")
    if not chosen.providers and named not in ("cpu", CPU.lower()):
        raise GraphPruneError(
            f"target: provider {provider!r} is one of ONNX Runtime; {chosen.title} runs on the CPU alone here: leave "
            f"it out"
        )
    return resolve_provider(provider) if chosen.providers else Provider(CPU)


