"""Training with pruning in mind against plain fine-tuning: the same network, budget, epochs and images.

    python -m tools.bench_sparse_learning --network resnet20 --seeds 0 1 2

Plain: prune, repair, train for all epochs. Group lasso, growing: train the dense network with the penalty for the first
of the epochs, prune and repair in the same way, train for the rest. Growing fades out what the plan for the dense
network removes. Reads the shared networks and data as `tools.bench_accuracy` does; writes docs/sparse-learning.md and
docs/sparse-learning.json. `--held-out 5000` is for choosing the settings: it trains on the others and measures on
these, and its rows get a table of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from tools._common import write

from .bench_accuracy import DOCS, loaders
from .bench_finetune import CHANNELS_LAST, Augmented

METHODS = ("plain", "lasso", "growing", "growing by norm")
SETTINGS = ("weight", "first", "epochs", "images", "of", "lr", "batch")


class Subset(Augmented):
    """So many images an epoch, others each time, shifted and mirrored."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, images: int) -> None:
        super().__init__(x, y, batch)
        self.images = images

    def __len__(self) -> int:
        return self.images // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y))
        for chosen in order[: len(self) * self.batch].split(self.batch):
            yield self._varied(self.x[chosen]), self.y[chosen]


class Trial:
    """One network, its data, and how it is pruned and trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, shared = options, loaders()
        raw = options.network == "resnet8"
        x, y = shared.cifar10("train", raw=raw, limit=options.of)
        if options.held_out:
            n = options.held_out
            self.tested, x, y = (x[-n:], y[-n:]), x[:-n], y[:-n]
        else:
            self.tested = shared.cifar10("test", raw=raw)
        self.dense: nn.Module = getattr(shared, options.network)().to(memory_format=CHANNELS_LAST)
        self.example, self.calibration = x[:2], list(x[:500].split(125))
        self.batches = Subset(x, y, options.batch, options.images)
        self.top1 = shared.top1

    def measure(self, model: nn.Module, images: int | None = None) -> float:
        x, y = self.tested
        return round(float(self.top1(model.eval(), x[:images], y[:images])), 2)

    def plan(self, model: nn.Module) -> graphprune.Plan:
        budget = graphprune.Budget(macs=1 / self.options.speedup)
        return graphprune.plan(model, self.example, budget=budget, fold_bn=False)

    def cut(self, model: nn.Module, plan: graphprune.Plan) -> nn.Module:
        return graphprune.recover(model, plan, self.example, self.calibration, "least_squares").model

    def train(self, model: nn.Module, epochs: int, seed: int, regularize: Any = None) -> nn.Module:
        return graphprune.finetune(
            model.to(memory_format=CHANNELS_LAST), self.batches, epochs=epochs, lr=self.options.lr, amp=True,
            seed=seed, regularize=regularize, progress=False,
        ).model.eval()  # fmt: skip

    def penalty(self, method: str, weight: float, plan: graphprune.Plan) -> graphprune.GroupPenalty:
        if method == "lasso":
            return graphprune.GroupLasso(self.dense, self.example, weight)
        steps = max(1, self.options.first * len(self.batches) // 2)
        chosen = plan if method == "growing" else None
        return graphprune.GrowingPenalty(self.dense, self.example, weight, steps, plan=chosen)


def measure(trial: Trial, method: str, weight: float, seed: int) -> dict[str, Any]:
    """One row."""
    options, start = trial.options, time.process_time()
    plan, model, first, learnt = trial.plan(trial.dense), trial.dense, 0, None
    if method != "plain":
        first = options.first
        model = trial.train(model, first, seed, trial.penalty(method, weight, plan))
        plan = plan if method == "growing" else trial.plan(model)
        learnt = trial.measure(model, options.quick)
    small = trial.cut(model, plan)
    before = trial.measure(small, options.quick)
    done = trial.train(small, options.epochs - first, seed + 100)
    dense, left = (graphprune.count(net, trial.example).macs for net in (trial.dense, done))
    return {
        "network": options.network, "held_out": options.held_out, "method": method, "seed": seed,
        "settings": {"weight": weight, "first": first, **{k: getattr(options, k) for k in SETTINGS[2:]}},
        "quick": options.quick, "speedup": options.speedup, "reached": round(dense / left, 3), "learnt": learnt,
        "before": before, "after": trial.measure(done), "seconds": round(time.process_time() - start),
    }  # fmt: skip


HEADER = """# Training with pruning in mind

`GroupLasso` and `GrowingPenalty` drive whole channels to zero while a network is trained, before it is pruned:

    lasso = graphprune.GroupLasso(model, example_input, weight=1e-3)
    for x, y in loader:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        lasso.add_gradients()        # or: (loss_fn(model(x), y) + lasso.penalty()).backward()
        optimizer.step()
    small = graphprune.prune(model, example_input, 0.5)

or `graphprune.finetune(model, loader, regularize="lasso")`, or `regularize=` of `graphprune.pipeline`. Gradients added
after `backward()`, as with Torch-Pruning's `regularize`, leave gradient scalers, clipping, accumulation,
DistributedDataParallel and the loss that is logged as they are, and need no graph over the weights. On ResNet-20 that
takes 10 ms of CPU time a step, where the step with 64 images takes 130.

## Against plain fine-tuning

CIFAR-10 {network}, pruned to {reached:.2f} times fewer multiply-accumulates. Every row had the same {epochs} epochs of
{images:,} of {of:,} training images, drawn anew for each, in {seeds} run(s): *plain* was pruned first and trained for
all of them; the others trained the dense network with a penalty for the first {first} and went on with the pruned one
for the rest. All were pruned by the default criterion within `Budget(macs=...)`, batch norms kept, refitted by least
squares on 500 unlabelled training images, and trained by `graphprune.finetune` (SGD with Nesterov momentum, batch
{batch}, peak rate {lr:g}, cosine, one for each part; mirrored and shifted images; bfloat16).

- *group lasso*: `GroupLasso(weight={lasso:g})`, then a new plan.
- *growing*: `GrowingPenalty(weight={growing:g}, plan=...)` for half of the steps: fades out what the plan for the dense
  network removes.

Top-1, mean and range: of the dense network after the training with the penalty and right after pruning
and least squares, both on {quick:,} test images, and in the end on the whole test set. The settings were chosen on
another network, with training images held from it (below). So few images are what a shared machine with two cores
allows; the papers (Fang et al., 2023; Wang et al., 2021) train for a hundred epochs and more.

Against plain, with the group lasso: {lasso_before:+.1f} points right after pruning, {lasso_after:+.1f} in the end; with
growing: {growing_before:+.1f} and {growing_after:+.1f}. {verdict}

Written by `python -m tools.bench_sparse_learning` ({machine}; {versions}). Seconds: CPU time of a run.

| method | after the penalty | pruned | trained | seconds |
| :-- | ---: | ---: | ---: | ---: |
"""
SHORT = """The penalty takes its epoch from the training of the pruned network, and where all of it is as short as
here that costs more than it gains: prune first where the dense network is trained already. Trainings as long as the
papers' were not measured here."""
TRIALS = """
## How the settings were chosen

{network}, trained without the last {held_out:,} training images and measured on these, which the dense network has
seen in its own training (figures before the last on 2,000 of them, least squares on 1,000 images).

| method | weight | epochs with it | of | rate | after the penalty | pruned | trained |
| :-- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
TITLES = {"plain": "plain", "lasso": "group lasso", "growing": "growing", "growing by norm": "growing, by norm"}


def page(every: list[dict[str, Any]]) -> str:
    """The page of all rows so far."""
    rows, trials = ([r for r in every if bool(r["held_out"]) == held] for held in (False, True))
    of = {m: [r for r in rows if r["method"] == m] for m in METHODS}
    weights = {m: found[-1]["settings"]["weight"] for m, found in of.items() if found}
    last = next(r for r in reversed(rows) if r["method"] != "plain")
    about = {
        **last["settings"], "quick": last["quick"], "network": _name(last["network"]),
        "reached": _mean(rows, "reached"), "seeds": len(of["plain"]), "lasso": weights["lasso"],
        "growing": weights["growing"], "machine": f"{os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }  # fmt: skip
    gains = {f"{m}_{k}": _mean(of[m], k) - _mean(of["plain"], k) for m in METHODS[1:3] for k in _SCORES[1:]}
    worse = max(gains["lasso_after"], gains["growing_after"]) < 0
    out = HEADER.format(**about, **gains, verdict=SHORT if worse else "")
    out += "".join(_line(m, found) for m, found in of.items() if found)
    if not trials:
        return out
    ordered = sorted(trials, key=lambda r: (METHODS.index(r["method"]), r["settings"]["weight"], r["settings"]["lr"]))
    about = {"network": _name(trials[-1]["network"]), "held_out": trials[-1]["held_out"]}
    return out + TRIALS.format(**about) + "".join(map(_trial, ordered))


def _name(network: str) -> str:
    return network.replace("resnet", "ResNet-")


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(r[key] for r in rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _line(method: str, rows: list[dict[str, Any]]) -> str:
    cells = ["-" if rows[0][k] is None else _spread([r[k] for r in rows]) for k in _SCORES]
    return f"| {TITLES[method]} | {' | '.join(cells)} | {_mean(rows, 'seconds'):.0f} |\n"


def _trial(row: dict[str, Any]) -> str:
    told, plain = row["settings"], row["method"] == "plain"
    weight, first, learnt = ("-",) * 3 if plain else (f"{told['weight']:g}", told["first"], f"{row['learnt']:.2f}")
    return (
        f"| {TITLES[row['method']]} | {weight} | {first} | {told['epochs']} | {told['lr']:g} | {learnt} | "
        f"{row['before']:.2f} | {row['after']:.2f} |\n"
    )


_SCORES = ("learnt", "before", "after")
_SAME = ("network", "held_out", "method", "seed", "settings", "speedup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20", choices=["resnet8", "resnet20", "resnet32", "resnet56"])
    parser.add_argument("--methods", nargs="+", default=["plain", "lasso", "growing"], choices=METHODS)
    parser.add_argument("--lasso", nargs="+", type=float, default=[1e-3], help="weights of the group lasso")
    parser.add_argument("--growing", nargs="+", type=float, default=[1.0], help="largest factors")
    parser.add_argument("--speedup", type=float, default=2.5)
    parser.add_argument("--epochs", type=int, default=4, help="of all training together")
    parser.add_argument("--first", type=int, default=2, help="of these with the penalty")
    parser.add_argument("--images", type=int, default=3000, help="of an epoch")
    parser.add_argument("--of", type=int, default=20000, help="training images that they are drawn from")
    parser.add_argument("--quick", type=int, default=1000, help="images to measure on in between")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--held-out", type=int, default=0, help="measure on this many training images left out")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    target, trial = DOCS / "sparse-learning.json", Trial(options)
    for seed in options.seeds:
        for method in options.methods:
            weights = {"plain": [0.0], "lasso": options.lasso}.get(method, options.growing)
            for weight in weights:
                row = measure(trial, method, weight, seed)
                print(row, flush=True)
                rows = json.loads(target.read_text()) if target.is_file() else []
                rows = [r for r in rows if [r[k] for k in _SAME] != [row[k] for k in _SAME]] + [row]
                write(target, json.dumps(rows, indent=1))
                if {r["method"] for r in rows if not r["held_out"]} >= {"plain", "lasso", "growing"}:
                    write(DOCS / "sparse-learning.md", page(rows))


if __name__ == "__main__":
    main()
