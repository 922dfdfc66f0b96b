"""What a network costs without each of its layers, measured."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import nn

from ..dependency.whole.blocks import Block
from ..errors import GraphPruneError
from ..plans.surgery import remove_layers
from ..support.progress import watched
from ..tracing.example import ExampleInput
from ..tracing.state import evaluating
from ..tracing.trace import run_model

Cost = Callable[[nn.Module], float]


def milliseconds(models: Iterable[nn.Module], example: ExampleInput) -> list[float]:
    """Median latency of each network in ONNX Runtime at the example's batch size, on one thread of the CPU.

    Networks are exported one after the other, so that one copy is in memory at a time, and measured alternated. Their
    files lie in a temporary folder together: as much disk as the networks have bytes.
    """
    from ..runtimes import export_onnx  # an optional dependency
    from ..runtimes.comparison import compare_in_onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, nn.Module | Path] = {}
        for number, model in enumerate(models):
            path = Path(folder) / f"{number}.onnx"
            export_onnx(model, example, path, dynamic_batch=False, check=False)
            files[str(number)] = path
        report = compare_in_onnxruntime(files, example, provider="cpu", check=False)
        return [float(report.row(name).median_ms) for name in files]


def measured_gains(model: nn.Module, blocks: Sequence[Block], example: ExampleInput, cost: Cost | None) -> list[float]:
    """The cost without each layer minus the cost of the network: what is gained most by leaving it out is lowest.

    `cost(network)`: a finite number, such as milliseconds on the device that counts, energy or bytes; None for
    `milliseconds`. A network that does not run without a layer gets infinity: that layer goes last.
    """
    runs = [_runs(model, block, example) for block in watched(blocks, "running without", len(blocks), "layers")]

    def networks() -> Iterator[nn.Module]:
        yield model
        for block, works in watched(zip(blocks, runs, strict=True), "measuring without", len(blocks), "layers"):
            if works:
                yield _without(model, block)

    found = milliseconds(networks(), example) if cost is None else [_cost(cost, net) for net in networks()]
    whole, rest = found[0], iter(found[1:])
    return [next(rest) - whole if works else math.inf for works in runs]


def _without(model: nn.Module, block: Block) -> nn.Module:
    """A copy with a bypass in the layer's place, which works where a list may not get shorter, and costs as little."""
    return remove_layers(model, [dataclasses.replace(block, listed=False)])


def _runs(model: nn.Module, block: Block, example: ExampleInput) -> bool:
    try:
        small = _without(model, block)
        with evaluating(small):
            run_model(small, example.clone(), "criterion")
    except GraphPruneError:
        return False
    return True


def _cost(cost: Cost, model: nn.Module) -> float:
    try:
        value = float(cost(model))
    except Exception as error:
        raise GraphPruneError(
            f"criterion: the function failed on a network, {type(error).__name__}: {error}; for layers it gets the "
            f"module and returns what it costs, a number"
        ) from error
    if not math.isfinite(value):
        raise GraphPruneError(f"criterion: the function returned {value} for a network; expected what it costs")
    return value


__all__ = ["measured_gains", "milliseconds"]
