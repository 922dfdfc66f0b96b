"""Prune networks by half, export them, and measure in ONNX Runtime on the CPU what that gained.

    python -m tools.bench_deploy                                 # ResNet-18, ResNet-50, MobileNetV2; docs/deploy.md
    python -m tools.bench_deploy --networks resnet18 --rounds 5  # quick look, writes nothing

The weights are random (latency does not depend on them), the batch norms' statistics and scales are not trivial
(parity does). Both files of a network are written by `export_onnx`, which compares them with PyTorch before they get
their names, at the batch size of the example and at one that was never traced; `graphprune.benchmark` then runs the
two by turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

import graphprune
from graphprune.runtimes import BenchmarkReport, ExportReport
from tools._common import all_networks, build, enliven, example_for, markdown_table, write

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
# The largest relative difference between an exported file and its PyTorch module that is accepted.
PARITY = 1e-4
OUTPUT = Path("docs/deploy.md")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One network: parameters and MACs (of one image) before and after, both files, a report for each thread count."""

    name: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    files: tuple[ExportReport, ExportReport]
    reports: tuple[BenchmarkReport, ...]

    @property
    def parity(self) -> float:
        """The larger of the two files' relative errors."""
        errors = [file.max_relative_error for file in self.files]
        return max(error for error in errors if error is not None)


def measure(name: str, folder: Path, options: argparse.Namespace) -> Measured:
    """Prune (and prove), export and time one network."""
    dense, example = build(name), example_for(name)
    enliven(dense, example_for(name, 4, seed=1))
    plan = graphprune.plan(dense, example, options.ratio, round_to=options.round_to)
    small = plan.apply(dense)
    graphprune.verify(dense, small, plan, example).raise_on_failure()
    counts = [graphprune.count(model, example) for model in (dense, small)]
    files = (
        graphprune.export_onnx(dense, example, folder / f"{name}.onnx"),
        graphprune.export_onnx(small, example, folder / f"{name}_pruned.onnx", plan=plan),
    )
    reports = [
        graphprune.benchmark(
            {"dense": files[0].path, "pruned": files[1].path},
            example,
            provider="cpu",
            threads=threads,
            batch_sizes=options.batches,
            rounds=options.rounds,
        )
        for threads in options.threads
    ]
    return Measured(
        name,
        (counts[0].parameters, counts[1].parameters),
        (counts[0].macs, counts[1].macs),
        files,
        tuple(reports),
    )


def size_rows(measured: Sequence[Measured]) -> list[list[str]]:
    """What became smaller, and how exact the files are."""
    rows = []
    for m in measured:
        errors = [f"{file.max_relative_error:.1e}" for file in m.files]
        rows.append(
            [
                m.name,
                f"{m.parameters[0] / 1e6:.2f} -> {m.parameters[1] / 1e6:.2f}",
                f"{m.macs[0] / 1e9:.2f} -> {m.macs[1] / 1e9:.2f}",
                f"{m.macs[0] / m.macs[1]:.2f}",
                f"{m.files[0].size / 2**20:.1f} -> {m.files[1].size / 2**20:.1f}",
                *errors,
            ]
        )
    return rows


def latency_rows(measured: Sequence[Measured]) -> list[list[str]]:
    """Latency before and after for every thread count and batch size."""
    rows = []
    for m in measured:
        for report in m.reports:
            for pruned in (row for row in report.rows if row.model == "pruned"):
                dense = report.row("dense", pruned.batch_size)
                times = [f"{r.median_ms:.2f} ({r.p10_ms:.2f} - {r.p90_ms:.2f})" for r in (dense, pruned)]
                interval = f"{pruned.speedup_low:.2f} - {pruned.speedup_high:.2f}"
                rows.append(
                    [m.name, str(report.threads), str(pruned.batch_size), *times, f"{pruned.speedup:.2f}", interval]
                )
    return rows


SIZES = ["network", "parameters, M", "MACs, G", "fewer MACs", "file, MiB", "parity, dense", "parity, pruned"]
LATENCIES = ["network", "threads", "batch", "dense, ms (p10 - p90)", "pruned, ms (p10 - p90)", "times faster", "95 %"]


def document(measured: Sequence[Measured], options: argparse.Namespace) -> str:
    """The Markdown page."""
    settings, machine, versions, *notes = measured[0].reports[0].circumstances()
    rounding = f", widths a multiple of {options.round_to}" if options.round_to > 1 else ""
    parts = [
        "# What pruning gains in ONNX Runtime",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "    python -m tools.bench_deploy",
        f"Ratio {options.ratio:g}{rounding}, 224 x 224 images. Measured on: {machine}. {versions}.",
        markdown_table(SIZES, size_rows(measured)),
        "*MACs* are those of one image; *parity* is max|onnx - torch| / max|torch|, batch norms folded.",
        markdown_table(LATENCIES, latency_rows(measured)),
        f"Milliseconds for one call with the whole batch; *times faster* is the quotient of the medians, with its "
        f"bootstrap interval. {settings.replace(', 1 thread,', ',')}.",
        *notes,
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a file is less exact than it must be."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_deploy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=all_networks(), metavar="NAME", help=f"default: {NETWORKS}")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to remove (default 0.5)")
    parser.add_argument("--round-to", type=int, default=1, help="keep multiples of this many channels (default 1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each (default 30)")
    parser.add_argument("--output", type=Path, help=f"Markdown page (default: {OUTPUT} for the default networks)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name in track(options.networks or NETWORKS, description="measuring", transient=True):
            measured.append(measure(name, Path(folder), options))
    text = document(measured, options)
    print(text)
    output = options.output or (None if options.networks else OUTPUT)
    if output:
        write(output, text)
        print(f"written: {output}")
    worst = max(measured, key=lambda m: m.parity)
    if worst.parity > PARITY:
        print(f"{worst.name}: the files differ from PyTorch by {worst.parity:.1e}, more than {PARITY:g}")
    return 1 if worst.parity > PARITY else 0


if __name__ == "__main__":
    sys.exit(main())
