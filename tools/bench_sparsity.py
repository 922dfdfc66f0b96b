"""Accuracy against sparsity, lottery tickets against their controls, and the sizes of sparse files.

    python -m tools.bench_sparsity              # everything, writes docs/sparsity.md and its plots
    python -m tools.bench_sparsity --seeds 2 --images 500 --output sparsity.md

The digits are those of scikit-learn: 1,000 for training, 400 on which the settings were chosen, 397 for the figures
here. The network is 64-100-50-10 with ReLU, trained for 300 steps of 60 images with Adam (0.0012). ResNet-20 and
ResNet-56 on CIFAR-10 are trained networks of the shared data folder; they are masked and not trained further.
Sparse ResNet-20 trained further, and its lottery tickets: [tickets.md](tickets.md).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import importlib.util
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from graphprune import sparsity
from graphprune.support.plots import new_figure, save_figure
from tools._common import machine_line, markdown_table, versions_line, write

OUTPUT = Path("docs/sparsity.md")
STEPS, TUNING, ROUNDS = 300, 100, 5
DIGITS = (0.5, 0.8, 0.9, 0.95)
CIFAR = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
STORAGE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
Curve = dict[float, list[float]]
Pruner = Callable[[nn.Module, float], nn.Module]
PATTERNS = {0.5: (2, 4), 0.75: (1, 4), 0.875: (1, 8)}


# -- digits


def digits_network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All images as (1797, 64) in 0..1 and labels, in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])


def train_digits(model: nn.Module, first: int, last: int) -> None:
    """Steps `first` to `last`; the images of a step are drawn from torch's random state."""
    x, y = digits()
    optimiser = torch.optim.Adam(model.parameters(), 0.0012)
    for _ in range(first, last):
        batch = torch.randint(0, 1000, (60,))
        optimiser.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()


@torch.no_grad()
def digits_accuracy(model: nn.Module) -> float:
    x, y = (part[1400:] for part in digits())
    return 100 * float((model(x).argmax(1) == y).float().mean())


def one_shot_methods(data: list[tuple[Tensor, Tensor]]) -> dict[str, Pruner]:
    """Unstructured pruning of a trained network, by name."""
    return {
        "magnitude, global": sparsity.magnitude,
        "magnitude, per layer": functools.partial(sparsity.magnitude, scope="layer"),
        "gradient": lambda m, s: sparsity.gradient(m, data, F.cross_entropy, s),
        "weight x gradient": lambda m, s: sparsity.gradient(m, data, F.cross_entropy, s, times_weight=True),
        "magnitude, global, reconstructed": lambda m, s: reconstructed(sparsity.magnitude, m, s, data),
    }


def reconstructed(method: Pruner, model: nn.Module, fraction: float, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Masked, and the weights that are left fitted to the dense network's layers: no labels, no training."""
    dense = copy.deepcopy(model)
    return sparsity.reconstruct(method(model, fraction), dense, data[0][0][:2], data)


def n_of_m(model: nn.Module, fraction: float) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first convolution has three channels and stays
        return sparsity.n_m(model, *PATTERNS[fraction])


def digits_one_shot(seeds: int) -> tuple[dict[str, Curve], dict[str, Curve], list[float]]:
    """Accuracies without and with training after pruning, and of the dense networks."""
    x, y = digits()
    data = list(zip(x[:1000].split(200), y[:1000].split(200), strict=True))
    before: dict[str, Curve] = {}
    after: dict[str, Curve] = {}
    dense = []
    cases = [(name, method, s) for name, method in one_shot_methods(data).items() for s in DIGITS]
    cases += [("N:M", n_of_m, s) for s in PATTERNS]
    cases += [("N:M, reconstructed", lambda m, s: reconstructed(n_of_m, m, s, data), s) for s in PATTERNS]
    for seed in range(seeds):
        torch.manual_seed(seed)
        trained = digits_network()
        train_digits(trained, 0, STEPS)
        dense.append(digits_accuracy(trained))
        for name, method, fraction in cases:
            model = method(copy.deepcopy(trained), fraction)
            before.setdefault(name, {}).setdefault(fraction, []).append(digits_accuracy(model))
            torch.manual_seed(1000 + seed)
            train_digits(model, 0, TUNING)
            after.setdefault(name, {}).setdefault(fraction, []).append(digits_accuracy(model))
    return before, after, dense


def digits_tickets(seeds: int) -> dict[str, Curve]:
    """Winning tickets and their controls, each trained for as many steps."""
    out: dict[str, Curve] = {}
    for fraction in DIGITS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            ticket = sparsity.lottery_ticket(
                digits_network(), train_digits, fraction, steps=STEPS, rounds=ROUNDS, seed=100 * seed
            )
            rivals = {
                "winning ticket": ticket.fresh(),
                "random reinitialisation": ticket.random_reinit(digits_network, 1000 + seed),
                "random masks": ticket.random_masks(1000 + seed),
            }
            for name, model in rivals.items():
                torch.manual_seed(5000 + seed)  # the same images in the same order
                train_digits(model, 0, STEPS)
                out.setdefault(name, {}).setdefault(fraction, []).append(digits_accuracy(model))
    return out


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % interval (Student's t)."""
    mean = float(np.mean(differences))
    wide = float(stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1))
    return mean, mean - wide, mean + wide


# -- CIFAR-10


def shared() -> ModuleType | None:
    """The loaders of the shared data folder, where there is one."""
    folder = Path(os.environ.get("GRAPHPRUNE_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    found = importlib.util.spec_from_file_location("shared_loaders", folder / "loaders.py")
    if not (folder / "loaders.py").is_file() or found is None or found.loader is None:
        return None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def cifar_curves(loaders: Any, images: int) -> tuple[dict[str, Curve], float, list[tuple[str, float]]]:
    """Curves on the first test images, the dense accuracy on them, and 50 % on the whole test set."""
    x, y = loaders.cifar10("test")
    calibration, labels = loaders.cifar10("train", 1000)
    data = list(zip(calibration.split(250), labels.split(250), strict=True))
    methods = one_shot_methods(data)

    def matched(model: nn.Module, fraction: float) -> nn.Module:
        return sparsity.match_statistics(sparsity.magnitude(model, fraction), loaders.resnet20(), calibration)

    methods["magnitude, global, statistics matched"] = matched
    cases = [(name, method, s) for name, method in methods.items() for s in CIFAR]
    cases += [("N:M", n_of_m, s) for s in PATTERNS]
    cases += [("N:M, reconstructed", lambda m, s: reconstructed(n_of_m, m, s, data), s) for s in PATTERNS]
    curves: dict[str, Curve] = {}
    for name, method, fraction in cases:
        accuracy = loaders.top1(method(loaders.resnet20(), fraction), x[:images], y[:images])
        curves.setdefault(name, {}).setdefault(fraction, []).append(accuracy)
        print(f"ResNet-20, {name}, {100 * fraction:g} %: {accuracy:.2f}", flush=True)
    whole = [
        ("dense", loaders.resnet20()),
        ("magnitude, 50 %", sparsity.magnitude(loaders.resnet20(), 0.5)),
        ("magnitude, 50 %, statistics matched", matched(loaders.resnet20(), 0.5)),
        ("magnitude, 50 %, reconstructed", reconstructed(sparsity.magnitude, loaders.resnet20(), 0.5, data)),
    ]
    accuracies = [(name, loaders.top1(model, x, y)) for name, model in whole]
    return curves, loaders.top1(loaders.resnet20(), x[:images], y[:images]), accuracies


# -- storage


def storage_rows(model: nn.Module) -> list[tuple[str, ...]]:
    """How many times smaller than dense float32 several files are, at every sparsity."""
    rows = []
    for fraction in STORAGE:
        masked = sparsity.magnitude(copy.deepcopy(model), fraction)
        plain = sparsity.make_permanent(copy.deepcopy(masked)).state_dict()
        dense = sum(t.numel() * t.element_size() for t in plain.values())
        with tempfile.TemporaryDirectory() as folder:
            exact = sparsity.save(masked, Path(folder) / "exact").stat().st_size
            half = sparsity.save(masked, Path(folder) / "half", values="float16").stat().st_size
        zipped = len(gzip.compress(b"".join(t.contiguous().numpy().tobytes() for t in plain.values()), 9))
        coo = _saved({n: t.to_sparse() if t.dim() > 1 else t for n, t in plain.items()})
        csr = _saved({n: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t for n, t in plain.items()})
        sizes = (exact, half, zipped, coo, csr)
        rows.append((f"{100 * fraction:g} %", f"{dense:,}", *(f"{dense / size:.2f}" for size in sizes)))
    return rows


def _saved(state: Mapping[str, Tensor]) -> int:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR tensors are announced as beta
        torch.save(dict(state), buffer)
    return buffer.getbuffer().nbytes


# -- the page


def curve_table(curves: Mapping[str, Curve], spread: bool = True) -> str:
    """Methods down, sparsities across; means with standard deviations over the seeds."""
    fractions = sorted({s for curve in curves.values() for s in curve})

    def cell(values: list[float] | None) -> str:
        if not values:
            return ""
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if spread else f"{values[0]:.2f}"

    rows = [(name, *(cell(curve.get(s)) for s in fractions)) for name, curve in curves.items()]
    return markdown_table(("method", *(f"{100 * s:g} %" for s in fractions)), rows)


def draw(path: Path, title: str, dense: float, curves: Mapping[str, Curve]) -> None:
    figure, axes = new_figure(7.5, 4.5)
    axes.axhline(dense, color="0.6", linewidth=1, label="dense")
    for name, curve in curves.items():
        points = sorted(curve)
        means = [float(np.mean(curve[s])) for s in points]
        axes.plot([100 * s for s in points], means, marker="o", markersize=4, label=name)
    axes.set_xlabel("sparsity of the weights, %")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def digits_section(seeds: int, folder: Path) -> list[str]:
    before, after, dense = digits_one_shot(seeds)
    tickets = digits_tickets(seeds)
    pairs = zip(tickets["winning ticket"][0.8], tickets["random reinitialisation"][0.8], strict=True)
    mean, low, high = interval([a - b for a, b in pairs])
    verdict = (
        f"Winning ticket minus random reinitialisation at 80 %: {mean:.1f} points, 95 % interval {low:.1f} to "
        f"{high:.1f} (paired, {seeds} seeds)."
    )
    print(verdict, flush=True)
    tuned = {f"{name}, {TUNING} steps after": after[name] for name in ("magnitude, global", "gradient", "N:M")}
    plot = folder / "sparsity-digits.svg"
    draw(plot, "Digits, 64-100-50-10", float(np.mean(dense)), {**tickets, **tuned})
    return [
        "## Digits: trained, pruned in one shot",
        "",
        f"Accuracy in %, mean and standard deviation of {seeds} networks; dense {np.mean(dense):.1f} ± "
        f"{np.std(dense, ddof=1):.1f}. Without training after pruning:",
        "",
        curve_table(before),
        "",
        f"With {TUNING} more steps, the masks in force:",
        "",
        curve_table(after),
        "",
        "N:M is 2:4, 1:4 and 1:8.",
        "",
        "## Digits: lottery tickets and their controls",
        "",
        f"Found in {ROUNDS} rounds and rewound to the initial weights. Every network is trained for {STEPS} steps.",
        "",
        curve_table(tickets),
        "",
        verdict,
        "",
        f"![digits]({plot.name})",
        "",
    ]


def cifar_section(loaders: Any, images: int, folder: Path) -> list[str]:
    curves, reference, whole = cifar_curves(loaders, images)
    plot = folder / "sparsity-resnet20.svg"
    draw(plot, "CIFAR-10, ResNet-20, no training", reference, curves)
    headings = ("sparsity", "dense, bytes", "save", "save, float16", "gzip -9 of dense", "torch COO", "torch CSR")
    return [
        "## CIFAR-10, ResNet-20: masked, no training",
        "",
        f"Accuracy in % on the first {images:,} test images (dense {reference:.2f}). Gradients, matched statistics",
        "(`match_statistics`) and reconstructed weights (`reconstruct`) come from 1,000 training images; the last two",
        "need no labels and no training.",
        "",
        curve_table(curves, spread=False),
        "",
        "At 50 % on all 10,000 test images:",
        "",
        markdown_table(("network", "accuracy, %"), [(name, f"{accuracy:.2f}") for name, accuracy in whole]),
        "",
        f"![ResNet-20]({plot.name})",
        "",
        "## File sizes, ResNet-56",
        "",
        "How many times smaller than dense float32. gzip and torch's sparse tensors (saved with `torch.save`) hold the",
        "same values exactly.",
        "",
        markdown_table(headings, storage_rows(loaders.resnet56())),
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_sparsity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="networks on the digits, at least 2 (default 5)")
    parser.add_argument("--images", type=int, default=10000, help="CIFAR-10 test images (default all 10,000)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"Markdown page (default {OUTPUT})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    folder = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    page = [
        "# Sparsity: accuracy and file sizes",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        "    python -m tools.bench_sparsity",
        "",
        f"Measured on: {machine_line(1)}. {versions_line('torch', 'numpy', 'scipy', 'scikit-learn')}.",
        "",
        *digits_section(options.seeds, folder),
    ]
    loaders = shared()
    if loaders is None:
        print("no shared data folder: CIFAR-10 and the file sizes are left out")
    else:
        page += cifar_section(loaders, options.images, folder)
    write(options.output, "\n".join(page))
    print(f"written: {options.output}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
