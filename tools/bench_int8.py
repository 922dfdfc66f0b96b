"""A trained network pruned and quantised: accuracy, file size and latency of fp32 and int8, dense and small.

    python -m tools.bench_int8                                        # ResNet-56 at 2x, onnxruntime and openvino
    python -m tools.bench_int8 --models resnet20 --runtimes onnxruntime
    python -m tools.bench_int8 --keep build/int8                      # what was pruned is read again the next time

Reads the trained networks and data of GRAPHPRUNE_SHARED_DATA (else ../shared/data beside the checkout). The small
network is planned by the criterion "reconstruction" and refitted by least squares from unlabelled training images, as
in `tools.bench_accuracy`; int8 is calibrated on some of the same images. Accuracy is what the file gives on the whole
test set, through `graphprune.export(evaluate=)`; latency is `graphprune.benchmark`'s, one image on one thread. Rows
measured before are kept and replaced runtime by runtime, in docs/int8.json and docs/int8.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.deployment.runner import Runner
from graphprune.runtimes.adapters import adapter
from tools._common import machine_line, markdown_table, versions_line, write
from tools.bench_accuracy import DOCS, loaders, task

TARGET = DOCS / "int8.json"
PAGE = DOCS / "int8.md"
CALIBRATION = 300
HEADER = """# Pruned and quantised

CIFAR-10, whole test set, on the files themselves: dense, and pruned to a budget of multiply-accumulates with the
criterion "reconstruction" and least squares from {images:,} unlabelled training images ({select} of them choose the
channels), nothing trained; int8 calibrated on {calibration} of these images. "of fp32": accuracy in points, size and
time as a share, against the same network in fp32 in the same runtime; "of dense": time against the dense network in the
same runtime and precision, with its 95 % interval. Time for one image on one thread, by turns.

Written by `python -m tools.bench_int8` ({machine}; {versions}).
"""


def small(name: str, speedup: float, images: int, select: int, keep: Path | None) -> nn.Module:
    """The pruned and refitted network, read again where it was kept."""
    made = task(name, images, held_out=False)
    path = None if keep is None else keep / f"{name}-{speedup:g}.graphprune"
    if path is not None and path.is_file():
        return graphprune.load(path, made.model)
    chosen = max(1, round(len(made.data) * select / images))
    plan = graphprune.plan(
        made.model, made.example, budget=graphprune.Budget(macs=1 / speedup), criterion="reconstruction",
        data=made.data[:chosen],
    )  # fmt: skip
    found = graphprune.recover(made.model, plan, made.example, made.data, "least_squares").model
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        graphprune.save(found, path)
    return found


def accuracy(run: Runner, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * float((run(x).argmax(1) == y).float().mean())


def measure(name: str, runtime: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network in one runtime."""
    made = task(name, options.images, held_out=False)
    dense, data = made.model, torch.cat(list(made.data))[:CALIBRATION]
    x, y = loaders().cifar10("test", raw=name == "resnet8")
    networks = {"dense": dense, f"{options.speedup:g}x": small(
        name, options.speedup, options.images, options.select_images, options.keep
    )}  # fmt: skip
    python = dict(item.split("=", 1) for item in options.python).get(runtime)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            calibration = data if precision == "int8" else None
            for label, network in networks.items():
                suffix = adapter(runtime).suffix
                artifact = graphprune.export(
                    network, x[:100], Path(folder) / f"{label}-{precision}{suffix}", runtime=runtime,
                    precision=precision, data=calibration, evaluate=lambda run: accuracy(run, x, y), rounds=0,
                    python=python,
                )  # fmt: skip
                print(artifact, flush=True)
                rows.append(
                    {
                        "model": name, "network": label, "runtime": runtime, "precision": precision,
                        "accuracy": artifact.evaluation, "bytes": artifact.size, "in_force": artifact.in_force,
                        "error": artifact.relative_error,
                    }
                )  # fmt: skip
    report = graphprune.benchmark(
        networks, x[:1], runtimes={runtime: python}, precisions=["fp32", "int8"], data=data, rounds=options.rounds,
        provider="cpu",
    )  # fmt: skip
    print(report, flush=True)
    timed = {(row.precision, row.model): row for row in report.rows}
    for row in rows:
        found = timed[row["precision"], row["network"]]
        row |= {
            "ms": found.median_ms, "relative": 1 / found.speedup, "low": 1 / found.speedup_high,
            "high": 1 / found.speedup_low, "clock": found.clock,
        }  # fmt: skip
    return rows


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The page."""
    headings = [
        "model", "network", "runtime", "precision", "top-1 %", "of fp32", "KiB", "of fp32", "ms", "of fp32",
        "of dense (95 %)",
    ]  # fmt: skip
    cells = []
    for row in rows:
        same = (row["model"], row["network"], row["runtime"])
        exact = next(r for r in rows if (r["model"], r["network"], r["runtime"]) == same and r["precision"] == "fp32")
        reference = row is exact
        share = "1" if row["network"] == "dense" else f"{row['relative']:.2f} ({row['low']:.2f} - {row['high']:.2f})"
        cells.append(
            [
                row["model"], row["network"], row["runtime"], row["precision"], f"{row['accuracy']:.2f}",
                "" if reference else f"{row['accuracy'] - exact['accuracy']:+.2f}", f"{row['bytes'] / 1024:,.0f}",
                "" if reference else f"{row['bytes'] / exact['bytes']:.2f}", f"{row['ms']:.3f}",
                "" if reference else f"{row['ms'] / exact['ms']:.2f}", share,
            ]
        )  # fmt: skip
    header = HEADER.format(
        images=options.images, select=options.select_images, calibration=CALIBRATION,
        machine=machine_line(torch.get_num_threads()), versions=versions_line("torch", "onnxruntime-gpu", "openvino"),
    )  # fmt: skip
    return header + "\n" + markdown_table(headings, cells) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet56"])
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=1500, help="unlabelled inputs")
    parser.add_argument("--select-images", type=int, default=250, help="how many of them choose the channels")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--python", nargs="+", default=[], metavar="RUNTIME=PYTHON", help="interpreters to run with")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--keep", type=Path, help="folder for pruned networks")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in options.models:
        for runtime in options.runtimes:
            new = measure(name, runtime, options)
            rows: list[dict[str, Any]] = json.loads(TARGET.read_text()) if TARGET.is_file() else []
            rows = [row for row in rows if (row["model"], row["runtime"]) != (name, runtime)] + new
            write(TARGET, json.dumps(rows, indent=1))
            write(PAGE, page(rows, options))


if __name__ == "__main__":
    main()
