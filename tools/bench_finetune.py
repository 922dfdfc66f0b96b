"""Accuracy after pruning and a short training, next to Torch-Pruning's network with the same training.

    python -m tools.bench_finetune --speedups 2 2.55 --epochs 3

CIFAR-10 ResNet-56. Ours: "reconstruction" and least squares on training images, batch norms kept. Theirs: the uniform
ratio that reaches the same multiply-accumulates, with the criterion that does best without training. Both are then
trained by the same `graphprune.finetune` call: the same images in the same order, optimizer, schedule and teacher,
whose block outputs and logits they learn from.
Reads the shared networks and data as `tools.bench_accuracy` does; writes docs/finetune.md and docs/finetune.json.
`--held-out 5000` is for choosing the options: it trains on the others and measures on these, turned, scaled, shifted
and with other contrast, since the dense network knows every training image by heart. Such rows get a table of their
own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from tools._common import write

from .bench_accuracy import (
    DOCS,
    Task,
    _importances,
    _peer_version,
    loaders,
    task,
    torch_pruning_ratio,
    torch_pruning_result,
)

CHANNELS_LAST = torch.channels_last


def disturbed(x: Tensor, seed: int) -> Tensor:
    """Images turned by up to 17 degrees, scaled by up to 22 %, shifted by up to 2 pixels, with other contrast and
    brightness, half of them mirrored: the dense network is as uncertain of them as of images that it has not seen."""
    generator = torch.Generator().manual_seed(seed)

    def between(reach: float, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * reach

    n = len(x)
    angle, scale = between(0.3, n), 1 + between(0.22, n)
    mirror = between(1, n).sign()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    turned = torch.stack([torch.stack([cosine * mirror, -sine], 1), torch.stack([sine * mirror, cosine], 1)], 1)
    grid = F.affine_grid(torch.cat([turned, between(0.15, n, 2, 1)], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return moved * (1 + between(0.25, n, 1, 1, 1)) + between(0.3, n, 1, 1, 1)


class Augmented:
    """Batches in a random order, each image shifted by up to four pixels and mirrored half of the time."""

    def __init__(self, x: Tensor, y: Tensor, batch: int) -> None:
        self.x, self.y, self.batch = F.pad(x, (4, 4, 4, 4)), y, batch

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y))
        for chosen in order[: len(self) * self.batch].split(self.batch):
            yield self._varied(self.x[chosen]), self.y[chosen]

    def _varied(self, x: Tensor) -> Tensor:
        n = len(x)
        columns = torch.arange(32)
        top, left = torch.randint(0, 9, (2, n, 1))
        across = left + torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(0))
        rows, samples = top + columns, torch.arange(n)
        picked = x.movedim(1, -1)[samples[:, None, None], rows[:, :, None], across[:, None, :]]
        return picked.movedim(-1, 1).contiguous(memory_format=CHANNELS_LAST)


def ours(made: Task, speedup: float) -> tuple[nn.Module, str]:
    """The residual streams stay whole, as Torch-Pruning's do, so that block outputs can be compared."""
    budget = graphprune.Budget(macs=1 / speedup)
    chosen: dict[str, Any] = {"criterion": "reconstruction", "data": made.data[: made.selection], "fold_bn": False}
    plan = graphprune.plan(made.model, made.example, budget=budget, ignore=["conv1", "layer*.conv2"], **chosen)
    return graphprune.recover(made.model, plan, made.example, made.data).model, "reconstruction + least_squares"


def theirs(made: Task, speedup: float, criterion: str) -> tuple[nn.Module, str]:
    ratio = torch_pruning_ratio(made, speedup)
    return torch_pruning_result(made, ratio, _importances()[criterion]), f"Torch-Pruning, {criterion}"


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Every third residual block; neither side narrows what they return."""
    return tuple(name for name, _ in model.named_modules() if name.startswith("layer") and name.count(".") == 1)[2::3]


def measure(side: str, speedup: float, options: argparse.Namespace) -> dict[str, Any]:
    """One row: prune, measure, train, measure."""
    made = task("resnet56", 1500, False)
    made.selection = 2
    x, y = loaders().cifar10("train", limit=options.images)
    if options.held_out:
        n = options.held_out
        seen, labels, x, y = x[-n:], y[-n:], x[:-n], y[:-n]
        tested = torch.cat([disturbed(seen, 1), disturbed(seen, 2)])
        made.measure = lambda net: float(loaders().top1(net, tested, torch.cat([labels, labels])))
    start = time.perf_counter()
    model, method = ours(made, speedup) if side == "ours" else theirs(made, speedup, options.peer_criterion)
    pruned = time.perf_counter() - start
    before = made.measure(model)
    print(f"{method} {speedup:g}x: {before:.2f} before training, {pruned:.0f} s", flush=True)
    done = graphprune.finetune(
        model.to(memory_format=CHANNELS_LAST),
        Augmented(x, y, options.batch),
        epochs=options.epochs,
        lr=options.lr,
        amp=True,
        teacher=graphprune.fold_conv_bn(made.model, made.example).to(memory_format=CHANNELS_LAST),
        distillation=graphprune.Distillation(
            temperature=options.temperature, weight=options.weight, features=blocks(made.model),
            feature_loss="mse", feature_weight=options.feature_weight,
        ),
        checkpoint=options.checkpoint and f"{options.checkpoint}-{side}-{speedup:g}.safetensors",
        on_epoch=lambda epoch, _: print(epoch, flush=True),
    )
    dense, small = (graphprune.count(net, made.example).macs for net in (made.model, done.model))
    seconds = round(sum(e.seconds for e in done.history))
    return {
        "held_out": options.held_out, "settings": {k: getattr(options, k) for k in TOLD}, "method": method,
        "speedup": speedup, "reached": round(dense / small, 3), "dense": round(made.measure(made.model), 2),
        "before": round(before, 2), "after": round(made.measure(done.model), 2), "seconds": seconds,
    }  # fmt: skip


TOLD = ("epochs", "batch", "lr", "temperature", "weight", "feature_weight")
HEADER = """# Accuracy after a short training

CIFAR-10 ResNet-56 (dense {dense:.2f} % on the whole test set), pruned to a budget of multiply-accumulates and trained
for {epochs} epochs on the training images: top-1 before and after. Residual streams stay whole. Both sides get the same
call of `graphprune.finetune` (batch {batch}, SGD with Nesterov momentum, peak rate {lr:g}, cosine, gradients clipped;
mirrored and shifted images; distillation from the dense network, temperature {temperature:g}, weight {weight:g}, and
the relative squared error of every third block's output, weight {feature_weight:g}; bfloat16 where autocast allows).
Torch-Pruning: its best criterion before training.

Written by `python -m tools.bench_finetune` ({machine}; {versions}). Seconds: the training, on a machine shared with
other work.

| method | MACs | before | after | seconds |
| --- | ---: | ---: | ---: | ---: |
"""


TRIALS = """
## How the settings were chosen

Ours, trained without the last 5,000 training images and measured on these, disturbed (`--held-out 5000`; the test
set is not looked at).

| MACs | epochs | batch | rate | temperature | teacher | blocks | before | after | dense |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def page(every: list[dict[str, Any]]) -> str:
    rows, trials = ([r for r in every if bool(r["held_out"]) == held] for held in (False, True))
    machine = f"{os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Torch-Pruning {_peer_version()}"
    lines = [
        f"| {r['method']} | {r['reached']:.2f}x | {r['before']:.2f} | {r['after']:.2f} | {r['seconds']} |"
        for r in sorted(rows, key=lambda r: (r["speedup"], r["after"]))
    ]
    about = {"machine": machine, "versions": versions, "dense": rows[-1]["dense"], **rows[-1]["settings"]}
    out = HEADER.format(**about) + "\n".join(lines) + "\n"
    return out + (TRIALS + "\n".join(map(_trial, sorted(trials, key=lambda r: r["after"]))) + "\n" if trials else "")


def _trial(row: dict[str, Any]) -> str:
    told = " | ".join(f"{row['settings'][k]:g}" for k in TOLD)
    return f"| {row['speedup']:g}x | {told} | {row['before']:.2f} | {row['after']:.2f} | {row['dense']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 2.55])
    parser.add_argument("--sides", nargs="+", choices=["ours", "peers"], default=["ours", "peers"])
    parser.add_argument("--peer-criterion", default="L1", help="Torch-Pruning's criterion")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--temperature", type=float, default=16.0)
    parser.add_argument("--weight", type=float, default=0.9, help="of the teacher in the loss")
    parser.add_argument("--feature-weight", type=float, default=1000.0, help="of the distance of block outputs")
    parser.add_argument("--images", type=int, default=50000, help="training images")
    parser.add_argument("--held-out", type=int, default=0, help="measure on this many training images left out")
    parser.add_argument("--checkpoint", help="beginning of the names of files that a stopped run goes on from")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    target = Path(DOCS / "finetune.json")
    for speedup in options.speedups:
        for side in options.sides:
            row = measure(side, speedup, options)
            print(row, flush=True)
            rows = json.loads(target.read_text()) if target.is_file() else []
            same = ("held_out", "method", "speedup", *(["settings"] if options.held_out else []))
            rows = [r for r in rows if [r[k] for k in same] != [row[k] for k in same]] + [row]
            write(target, json.dumps(rows, indent=1))
            if not all(r["held_out"] for r in rows):
                write(DOCS / "finetune.md", page(rows))


if __name__ == "__main__":
    main()
