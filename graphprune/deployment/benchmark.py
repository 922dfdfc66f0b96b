"""`benchmark`: latency of several models, measured so that their ratio can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import GraphPruneError
from ..runtimes.candidates import Model
from ..runtimes.comparison import compare_in_onnxruntime
from ..runtimes.providers import Provider
from ..runtimes.results import BenchmarkReport
from ..support.doors import door
from ..support.progress import ProgressOption, reported
from ..support.types import PathLike
from .across import Asked, compare_runtimes
from .calibrating import check_data


@door()
@reported("benchmark")
def benchmark(
    models: Mapping[str, Model],
    example_input: Any,
    *,
    runtimes: str | Sequence[str] | Mapping[str, PathLike | None] | None = None,
    precisions: str | Sequence[str] | None = None,
    data: Any = None,
    samples: int = 300,
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
    """Measure the latency of `models` where they run, by turns: in ONNX Runtime, or in `runtimes` and `precisions`.

    ONNX Runtime in float32, unless others are asked for: modules are exported by `export_onnx` to a temporary folder
    (with a dynamic batch; where that fails, one file per batch size, and a note). In every round each model is measured
    once, in an order shuffled anew, so that whatever slows the machine down for a while slows all models alike. Inputs
    and outputs stay on the provider's device. A sample is the mean over as many calls in a row as take `min_time`;
    medians, percentiles and the interval of the speed-up are over the samples of all rounds.

    With `runtimes` or `precisions` one table over all of them: each runtime in a process of its own, its files written
    as `graphprune.export` does, the models timed by turns within a runtime, precision and batch size, and speed-ups
    against the baseline there. What is read is chosen by what is measured, and said in `notes`: the clock on the wall;
    where others use the CPU, the CPU time of the process (one thread), or the fastest samples (several). A runtime or
    precision that cannot be measured is left out with a note, unless nothing else is asked for.

    Takes about len(models) x len(batch_sizes) x rounds x max(min_time, latency) seconds, and the exports before.

    Args:
        models: name -> module, or path of an ONNX file; with `runtimes` also of a file that the runtime takes.
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
        runtimes: names of runtimes, "all" for those that are usable here, or name -> path of a Python interpreter whose
            environment has graphprune and that runtime (None: this one). See `graphprune.runtimes.usable_runtimes`.
        precisions: some of "fp32", "bf16", "fp16", "int8"; only "fp32" if None.
        data, samples: calibration inputs for int8, as in `graphprune.export`.
        seed: of the order of measurements, the bootstrap and the rows of enlarged batches.
        progress: as in `graphprune.plan`. Nothing is drawn while something is timed.

    `provider_options`, `cuda_graph` and `opset` belong to ONNX Runtime alone, and cannot be combined with `runtimes`.

    Raises:
        GraphPruneError: no models, an unknown baseline, a setting out of range, a provider that is not usable, a
            module that cannot be exported, a file that cannot be run with this input or at this batch size.
    """
    if runtimes is None and precisions is None:
        check_data(data, samples, ("fp32",))
        return compare_in_onnxruntime(
            models, example_input, provider=provider, threads=threads, batch_sizes=batch_sizes, warmup=warmup,
            rounds=rounds, min_time=min_time, baseline=baseline, provider_options=provider_options,
            cuda_graph=cuda_graph, opset=opset, check=check, seed=seed,
        )  # fmt: skip
    for name, value in (("provider_options", provider_options), ("cuda_graph", cuda_graph), ("opset", opset)):
        if value:
            raise GraphPruneError(f"{name} belongs to ONNX Runtime alone: leave out runtimes= and precisions=")
    asked = Asked.of(
        runtimes, precisions, data=data, samples=samples, provider=provider, threads=threads, warmup=warmup,
        rounds=rounds, min_time=min_time, check=check, seed=seed,
    )  # fmt: skip
    return compare_runtimes(models, example_input, asked, batch_sizes=batch_sizes, baseline=baseline)
