"""Train a small network on real digits, prune it at several ratios, fine-tune, export, and measure what it gained.

    make demo                                  # or: python -m tools.demo --help

The data are the 1,797 handwritten digits of the UCI "Optical Recognition of Handwritten Digits" test set, which
scikit-learn ships; 500 of them are held out, always the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune.runtimes import BenchmarkReport, BenchmarkRow, ExportReport
from graphprune.support.plots import save_figure
from models import digits_resnet

RATIOS = (0.25, 0.5, 0.7, 0.85)
HELD_OUT = 500
CALIBRATION = 512


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) scaled to [-1, 1], and labels (n,) from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network of the comparison, as it is exported. Accuracies are shares of the held-out digits."""

    name: str
    model: nn.Module
    parameters: int
    macs: int
    accuracy_after_cut: float | None
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """A network, its latency, and the largest relative difference between its ONNX file and PyTorch."""

    variant: Variant
    latency: BenchmarkRow
    parity: float


def load_split(seed: int = 0) -> Digits:
    """The digits, split by class so that every digit is held out equally often."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=HELD_OUT, random_state=seed, stratify=labels
    )

    def as_images(flat: Any) -> Tensor:
        return torch.tensor(flat, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1

    return Digits(as_images(train_x), torch.tensor(train_y), as_images(test_x), torch.tensor(test_y))


def trained(model: nn.Module, digits: Digits, *, epochs: int, peak_rate: float, seed: int) -> nn.Module:
    """A copy of the model, trained with AdamW and cross-entropy."""
    images = TensorDataset(digits.train_images, digits.train_labels)
    # The last, partial batch is left out: batch statistics over a handful of images are too rough.
    batches = DataLoader(images, batch_size=64, shuffle=True, drop_last=True)
    return graphprune.finetune(
        model, batches, epochs=epochs, optimizer="adamw", lr=peak_rate, weight_decay=0.05, warmup=0.3, seed=seed,
        progress=False,
    ).model  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the held-out digits that the model gets right."""
    model.eval()
    guesses: Tensor = model(digits.test_images).argmax(dim=1)
    return (guesses == digits.test_labels).double().mean().item()


def deployed(name: str, model: nn.Module, example: Tensor, digits: Digits, before: float | None) -> Variant:
    """The network with its batch norms folded, which is how all of them are counted, exported and timed."""
    folded = graphprune.fold_conv_bn(model, example)
    counted = graphprune.count(folded, example[:1])
    return Variant(name, folded, counted.parameters, counted.macs, before, accuracy(folded, digits))


def pruned_variant(dense: nn.Module, ratio: float, example: Tensor, digits: Digits, arguments: Any) -> Variant:
    """Prunes a copy of `dense` by `ratio`, repairs it from images without labels, fine-tunes it and folds its batch
    norms."""
    # The batch norms stay until after fine-tuning, which they make faster and steadier.
    images = digits.train_images[:CALIBRATION].split(128)
    model = graphprune.prune(dense, example, ratio, fold_bn=False, data=list(images))
    before = accuracy(model, digits)
    model = trained(model, digits, epochs=arguments.tune_epochs, peak_rate=2e-3, seed=arguments.seed + 1)
    return deployed(f"cut {100 * ratio:g}%", model, example, digits, before)


def export(variant: Variant, example: Tensor, folder: Path) -> ExportReport:
    """Writes the network as an ONNX file, which is compared with PyTorch before it gets its name."""
    return graphprune.export_onnx(variant.model, example, folder / f"{variant.name.replace(' ', '_').rstrip('%')}.onnx")


def run(arguments: Any, console: Console) -> tuple[list[Measured], BenchmarkReport]:
    """The whole demonstration; returns the networks in the order of the table, the dense one first."""
    digits = load_split()
    ratios = sorted(set(arguments.ratios))
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training the dense network", total=3 + 2 * len(ratios))
        network, _ = digits_resnet(seed=arguments.seed)
        example = digits.test_images[: arguments.batch].clone()
        dense = trained(network, digits, epochs=arguments.epochs, peak_rate=4e-3, seed=arguments.seed)
        variants = [deployed("dense", dense, example, digits, None)]
        progress.advance(task)
        for ratio in ratios:
            progress.update(task, description=f"pruning and fine-tuning at {100 * ratio:g}%")
            variants.append(pruned_variant(dense, ratio, example, digits, arguments))
            progress.advance(task)
        files: dict[str, ExportReport] = {}
        for variant in variants:
            progress.update(task, description=f"exporting: {variant.name}")
            files[variant.name] = export(variant, example, arguments.output)
            progress.advance(task)
        progress.update(task, description="benchmarking in ONNX Runtime")
        # The very files just written, measured by turns: what else the machine does meets all of them alike.
        paths = {name: file.path for name, file in files.items()}
        report = graphprune.benchmark(paths, example, provider=arguments.provider, rounds=100)
        progress.advance(task)
    measured = []
    for variant in variants:
        parity = files[variant.name].max_relative_error
        assert parity is not None  # only export_onnx(check=False) leaves it out
        measured.append(Measured(variant, report.row(variant.name), parity))
    return measured, report


def as_table(measured: Sequence[Measured], arguments: Any) -> Table:
    """One row per network; every ratio compares with the dense network. Fits a terminal of 80 columns."""
    dense = measured[0].variant
    title = (
        f"Digits of {HELD_OUT} held out that are right after the cut and after fine-tuning;\n"
        f"milliseconds per batch of {arguments.batch} in ONNX Runtime; parity: largest relative difference to PyTorch"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    headings = "params\nleft", "MACs\nleft", "right\ncut", "right\ntuned", "median\np10-p90", "speed-up\n95 %", "parity"
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in measured:
        variant, row = entry.variant, entry.latency
        after_cut = variant.accuracy_after_cut
        table.add_row(
            variant.name,
            f"{variant.parameters:,}\n{variant.parameters / dense.parameters:.1%}",
            f"{variant.macs / 1e6:.2f} M\n{variant.macs / dense.macs:.1%}",
            "-" if after_cut is None else f"{after_cut:.1%}",
            f"{variant.accuracy:.1%}",
            f"{row.median_ms:.2f}\n{row.p10_ms:.2f}-{row.p90_ms:.2f}",
            "-" if variant is dense else f"{row.speedup:.2f}x\n{row.speedup_low:.2f}-{row.speedup_high:.2f}",
            f"{entry.parity:.0e}",
        )
    return table


def plot(measured: Sequence[Measured], ratios: Sequence[float], path: Path) -> None:
    """Accuracy and speed-up against the share of channels removed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    dense = measured[0].variant
    removed = [100 * ratio for ratio in ratios]
    variants = [entry.variant for entry in measured[1:]]
    rows = [entry.latency for entry in measured[1:]]
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(100 * dense.accuracy, color="0.5", linestyle="--", label="dense")
    upper.plot(removed, [100 * variant.accuracy for variant in variants], "o-", label="fine-tuned")
    after_cut = [100 * (variant.accuracy_after_cut or 0.0) for variant in variants]
    upper.plot(removed, after_cut, "s:", label="right after the cut")
    upper.set_ylabel("accuracy on held-out digits, %")
    upper.legend(loc="lower left")
    # A percentile interval of a bootstrap need not contain the estimate, and a bar cannot be negative.
    errors = [
        [max(0.0, row.speedup - row.speedup_low) for row in rows],
        [max(0.0, row.speedup_high - row.speedup) for row in rows],
    ]
    lower.errorbar(
        removed, [row.speedup for row in rows], yerr=errors, fmt="o-", capsize=3, label="measured, with 95 % interval"
    )
    fewer = [dense.macs / variant.macs for variant in variants]
    lower.plot(removed, fewer, ":", color="0.5", label="fewer MACs")
    lower.axhline(1, color="0.5", linestyle="--", label="dense")
    lower.set_yscale("log", base=2)
    lower.yaxis.set_major_formatter(ScalarFormatter())
    lower.set_ylabel("speed-up in ONNX Runtime")
    lower.set_xlabel("channels removed, %")
    lower.legend()
    save_figure(figure, path, dpi=120)


def at_least_one(text: str) -> int:
    """Argument type of epochs and batches."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the demonstration."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="fractions of channels to remove")
    parser.add_argument("--epochs", type=at_least_one, default=12, help="of training the dense network (default 12)")
    parser.add_argument("--tune-epochs", type=at_least_one, default=4, help="of fine-tuning each one (default 4)")
    parser.add_argument("--batch", type=at_least_one, default=32, help="images per timed call (default 32)")
    parser.add_argument("--provider", default="auto", help="ONNX Runtime provider: auto, cpu or cuda (default auto)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for ONNX files and the plot")
    arguments = parser.parse_args(argv)
    console = Console()
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        measured, report = run(arguments, console)
    except graphprune.GraphPruneError as error:
        parser.error(str(error))
    console.print(as_table(measured, arguments))
    for line in report.circumstances():
        console.print(line, highlight=False, markup=False)
    plot(measured, sorted(set(arguments.ratios)), arguments.output / "demo.png")
    report.to_json(arguments.output / "benchmark.json")
    console.print(f"plot, measurements and ONNX files: {arguments.output} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
