"""ONNX Runtime in this process, in float32: computations, and whole networks, profiled once and timed by turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...support.progress import stage
from ..arguments import FlatArguments
from ..export import export_onnx
from ..exported import ExportReport
from ..machine import describe_machine, describe_versions
from ..measure import Settings, alternate
from ..profiles import Profile, profile
from ..providers import CPU, Provider
from ..sessions import BoundSession, device_of, match_inputs, open_session
from .chains import make_chain_meter
from .kernels import Sample
from .meters import Reading, make_meter
from .rig import Bench, Rig

_ROUNDS, _WARMUP, _MIN_TIME, _RUNS = 40, 5, 0.01, 20


class OnnxRig(Rig):
    """See `Rig`. `options`: of the provider, as texts."""

    def __init__(self, provider: Provider, threads: int, options: dict[str, str]) -> None:
        self.provider, self.threads, self.options = provider, threads, options
        versions = describe_versions()
        self.about = {
            "runtime": "onnxruntime", "precision": "fp32", "provider": provider.name, "threads": threads,
            "options": options, **describe_machine(provider, device_of(options)),
            "onnxruntime": versions["onnxruntime"],
        }  # fmt: skip
        self._meter = make_meter(provider, threads, options)
        self._chain_meter = make_chain_meter(provider, threads, options)

    def meter(self, samples: Sequence[Sample]) -> list[Reading]:
        return self._meter(samples)

    def chain_meter(self, kind: str, widths: Sequence[int]) -> list[float]:
        return self._chain_meter(kind, widths)

    def bench(self, model: nn.Module, example: Any) -> Bench:
        return OnnxBench(model, example, self.provider, self.threads, self.options)


class OnnxBench(Bench):
    """See `Bench`. Files lie in a folder that is gone afterwards."""

    def __init__(
        self, model: nn.Module, example: Any, provider: Provider, threads: int, options: dict[str, str]
    ) -> None:
        self.example, self.provider, self.threads, self.options = example, provider, threads, options
        self.arguments = FlatArguments.of(example, model)
        self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        self._count = 0
        try:
            self._dense = self._export(model).path
            self._session = self._open(self._dense)
        except BaseException:
            self._folder.cleanup()
            raise

    def close(self) -> None:
        del self._session
        self._folder.cleanup()

    def profile(self) -> Profile:
        session = open_session(self._dense, self.provider, threads=1)
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in match_inputs(session, self.arguments)}
        found = profile(self._dense, feeds, self.provider, threads=self.threads, options=self.options, runs=_RUNS)
        nodes = found.nodes if self.provider.name == CPU else ()
        return Profile(nodes, min(self._times([self._session])[0] for _ in range(2)))

    def compare(self, small: nn.Module) -> tuple[float, float]:
        report = self._export(small)
        try:
            dense, pruned = self._times([self._session, self._open(report.path)])
        finally:
            for file in (report.path, report.external_data):
                if file is not None:
                    file.unlink(missing_ok=True)
        return dense, pruned

    def _export(self, model: nn.Module) -> ExportReport:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.onnx"
        return export_onnx(model, self.example, path, dynamic_batch=False, check=False)

    def _open(self, path: Path) -> BoundSession:
        session = open_session(path, self.provider, threads=self.threads, provider_options=self.options)
        return BoundSession(session, self.arguments, self.provider, device_of(self.options))

    def _times(self, sessions: Sequence[BoundSession]) -> list[float]:
        settings = Settings(self.provider, self.options, self.threads, False, _WARMUP, _ROUNDS, _MIN_TIME, 0)
        with stage("timing", _ROUNDS, "rounds", still=True) as now:
            _, samples = alternate([s.run for s in sessions], settings, now.advance)
        return [float(np.median(s)) for s in samples]
