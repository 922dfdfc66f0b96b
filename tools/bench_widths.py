"""What widths cost: one line of pruning in ONNX Runtime's fp32 and int8, beside other widths for the same ratio.

    python -m tools.bench_widths                                   # MobileNetV2 and ResNet-50 at 0.3; docs/widths.md
    python -m tools.bench_widths --sweep                           # parameters left by all of torchvision at 0.5
    python -m tools.bench_widths --networks resnet18 --rounds 5    # quick look, writes nothing

Random weights (latency does not depend on them), batch 1 at 224 x 224, one thread. int8 is what runs fast on CPUs with
AVX-512 VNNI: QDQ, uint8 activations, int8 weights per channel. Every file of a network runs by turns with all others in
one process; what is compared are medians of process CPU time, which other processes disturb less than wall-clock time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch_pruning
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import graphprune
from graphprune.runtimes.machine import cpu_model
from tools._common import all_networks, build, enliven, example_for, markdown_table, parameter_count, write

NETWORKS = ("mobilenet_v2", "resnet50")
DENSE, AUTO = "dense", 'round_to="auto" (default)'
OUTPUT, RESULTS = Path("docs/widths.md"), Path("docs/widths.json")
LARGE = 100_000_000  # parameters: larger networks are planned without weights


def variants(model: nn.Module, x: torch.Tensor, ratio: float) -> dict[str, Callable[[], nn.Module]]:
    """What is compared, by name."""
    return {
        DENSE: lambda: graphprune.fold_conv_bn(model, x),
        AUTO: lambda: graphprune.prune(model, x, ratio),
        **{
            f"round_to={step}": functools.partial(graphprune.prune, model, x, ratio, round_to=step)
            for step in (1, 4, 8, 16)
        },
        "Torch-Pruning": lambda: torch_pruned(model, x, ratio),
    }


def torch_pruned(model: nn.Module, x: torch.Tensor, ratio: float) -> nn.Module:
    """Torch-Pruning's widths for the same ratio: magnitude, every group alike, the classifier kept."""
    small = copy.deepcopy(model)
    last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    torch_pruning.pruner.BasePruner(small, x, importance, pruning_ratio=ratio, ignored_layers=last).step()
    return graphprune.fold_conv_bn(small, x)


class Random(CalibrationDataReader):
    """Eight random images."""

    def __init__(self, name: str, x: torch.Tensor) -> None:
        generator = np.random.default_rng(0)
        shape = tuple(x.shape)
        self.left = [{name: generator.standard_normal(shape, np.float32)} for _ in range(8)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def files(small: nn.Module, x: torch.Tensor, path: Path) -> dict[str, Path]:
    """The exported network in both precisions."""
    plain, ready, quantised = (path.with_suffix(end) for end in (".onnx", ".ready.onnx", ".int8.onnx"))
    graphprune.export_onnx(small, x, plain)
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    name = onnxruntime.InferenceSession(str(plain), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        str(ready), str(quantised), Random(name, x), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return {"fp32": plain, "int8": quantised}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(paths: dict[str, Path], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds of CPU per call, medians over rounds in which each file runs a few times."""
    sessions = {name: session(path) for name, path in paths.items()}
    inputs = {name: {s.get_inputs()[0].name: x.numpy()} for name, s in sessions.items()}
    found: dict[str, list[float]] = {name: [] for name in paths}
    for name, s in sessions.items():
        s.run(None, inputs[name])
    for _ in range(rounds):
        for name, s in sessions.items():
            start, calls = time.process_time(), 5
            for _ in range(calls):
                s.run(None, inputs[name])
            found[name].append((time.process_time() - start) / calls)
    return {name: statistics.median(times) for name, times in found.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    network: str
    variant: str
    macs: int
    parameters: int
    widths: int  # outputs of convolutions that are no multiple of 16
    seconds: dict[str, float]


def measure(network: str, ratio: float, rounds: int, folder: Path) -> list[Row]:
    x = example_for(network)
    model = build(network)
    enliven(model, example_for(network, 2, seed=1))
    paths: dict[str, dict[str, Path]] = {}
    counts, odd = {}, {}
    for name, make in variants(model, x, ratio).items():
        small = make()
        counts[name] = graphprune.count(small, x)
        odd[name] = sum(m.out_channels % 16 > 0 for m in small.modules() if isinstance(m, nn.Conv2d))
        paths[name] = files(small, x, folder / f"{network}-{len(paths)}")
    seconds = {kind: timed({n: p[kind] for n, p in paths.items()}, x, rounds) for kind in ("fp32", "int8")}
    return [
        Row(network, n, counts[n].macs, counts[n].parameters, odd[n], {k: s[n] for k, s in seconds.items()})
        for n in paths
    ]


def left(network: str, ratio: float) -> dict[str, Any]:
    """Fractions of the parameters that stay with every width allowed, and by default."""
    model, x = build(network, "meta" if parameter_count(network) > LARGE else "cpu"), example_for(network)
    x = x.to(next(model.parameters()).device)
    dense = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"network": network}
    for key, options in (("every", {"round_to": 1}), ("auto", {})):
        plan = graphprune.plan(model, x, ratio, **options)  # type: ignore[arg-type]
        found[key] = sum(p.numel() for p in plan.apply(model).parameters()) / dense
        found[f"{key}, gone"] = plan.gone
        narrow = [g for g in plan.groups if g.asked is not None and g.asked < 16 and g.kept < g.size]
        found["narrow"] = len(narrow) / max(1, sum(g.asked is not None for g in plan.groups))
    return found


def page(speed: list[dict[str, Any]], sweep: list[dict[str, Any]], about: str) -> str:
    parts = [
        "# Widths that no runtime punishes\n",
        (__doc__ or "").split("\n\n", 2)[2].strip() + "\n",
        "    python -m tools.bench_widths\n    python -m tools.bench_widths --sweep\n",
        f"Measured on: {about}\n",
        INTRODUCTION,
    ]
    for network in dict.fromkeys(row["network"] for row in speed):
        mine = [row for row in speed if row["network"] == network]
        dense = mine[0]
        parts.append(f"\n## {network}\n")
        table = []
        for row in mine:
            cells = [row["variant"], *(f"{dense[k] / row[k]:.2f}x" for k in ("macs", "parameters")), f"{row['widths']}"]
            for kind, seconds in row["seconds"].items():
                cells += [f"{1e3 * seconds:.2f}", f"{dense['seconds'][kind] / seconds:.2f}x"]
            table.append(cells)
        heads = ["widths", "fewer MACs", "fewer parameters", "widths off 16", "fp32 ms", "faster", "int8 ms", "faster"]
        parts.append(markdown_table(heads, table))
    if sweep:
        parts.append(_swept(sweep))
    return "\n".join(parts) + "\n"


def _swept(sweep: list[dict[str, Any]]) -> str:
    apart = [row for row in sweep if abs(row["auto"] / row["every"] - 1) > 0.02]
    table = []
    for row in sorted(apart, key=lambda row: -abs(row["auto"] / row["every"] - 1)):
        shares = [f"{row['every']:.1%}", f"{row['auto']:.1%}", f"{100 * (row['auto'] / row['every'] - 1):+.1f} %"]
        table.append([row["network"], *shares, f"{row['every, gone']:.3f} / {row['auto, gone']:.3f}"])
    return "\n".join(
        [
            "\n## Parameters left by torchvision's networks at ratio 0.5\n",
            f"Of {len(sweep)} networks {len(sweep) - len(apart)} keep the same number of parameters within 2 % as with",
            "`round_to=1`. The others, with the mean fraction that goes (asked: 0.5) in both:\n",
            markdown_table(["network", "every width", "auto", "apart", "gone, every / auto"], table),
            REASONS,
        ]
    )


INTRODUCTION = """A ratio of 0.3 leaves 67.2 of 96 channels. With 67, some runtimes leave the kernels that made 96 fast,
and the pruned network is slower than the dense one. `round_to="auto"`, the default, keeps widths that were at least as
fast as the next larger ones in every runtime and precision that was measured: multiples of 16 from 32 channels on, of 8
from 16, of 4 from 4, and any number of whole heads. What rounding up leaves in one group, rounding down takes from
another, so that the mean fraction that goes is the one asked for, groups weighted by their multiply-accumulates; the
plan says both.
"""
REASONS = """
Why: half of these widths is no allowed one, and the next above or below is taken so that the *mean by
multiply-accumulates* is 0.5; parameters sit elsewhere. RegNets: groups 56, 112, 120 and 168 wide (24 or 32 of 56 stay),
streams of 72, 104, 208, 240, 440, 720. EfficientNet-B3: streams of 40, 136 and 232. MNASNet 1.3: 40, 56, 72, 168, 624,
1488. ShuffleNets: branches of 44, 88 and 176, whose halves have to stay equal through the shuffles; with every width,
rounding within the nested halves leaves more than was asked (0.40 instead of 0.50 goes), and "auto" comes nearer.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sweep", action="store_true", help="parameters left, instead of times")
    parser.add_argument("--page", action="store_true", help="only write the page from what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser advises to do what was done
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"speed": [], "sweep": []}
    if options.sweep:
        known["sweep"] = []
        for name in all_networks():
            known["sweep"].append(left(name, 0.5))
            print(known["sweep"][-1], flush=True)
    elif not options.page:
        with tempfile.TemporaryDirectory() as folder:
            known["speed"] = [
                dataclasses.asdict(row)
                for name in options.networks
                for row in measure(name, options.ratio, options.rounds, Path(folder))
            ]
        packages = [f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime-gpu", "torch-pruning")]
        known["about"] = f"{cpu_model()}, {', '.join(packages)}; ratio {options.ratio:g}, {options.rounds} rounds."
    text = page(known["speed"], known["sweep"], known["about"])
    print(text)
    if tuple(options.networks) == NETWORKS:
        write(RESULTS, json.dumps(known, indent=1))
        write(OUTPUT, text)


if __name__ == "__main__":
    main()
