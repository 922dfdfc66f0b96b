"""What fitting whole blocks on unlabelled inputs adds to least squares.

    python -m tools.bench_blocks --models resnet20 --speedups 2 --images 1500 --select-images 750
    python -m tools.bench_blocks --models resnet56 --speedups 2 3 --images 1500 --select-images 250 --round-to 1
    python -m tools.bench_blocks --models resnet56 --speedups 3 --images 1500 --select-images 250 --round-to 1 --augment
    python -m tools.bench_blocks --models resnet56 --speedups 3 --images 1500 ... --augment --passes 60
    python -m tools.bench_blocks --models resnet20 --speedups 1.5 --images 1500 --select-images 750 --settings

Networks, data and plans are those of `tools.bench_accuracy`: the criterion "reconstruction", then `recover` by
"least_squares" and by "blocks" from the same unlabelled inputs; whole test sets. `--round-to 1`: widths of any size,
which is most accurate for its multiply-accumulates, instead of those that run well. `--augment`: in every step each
image is mirrored or not and shifted by up to two pixels (the networks on CIFAR-10 alone). `--settings` compares
settings of `BlockFit` on held-out training data, and writes nothing but that table. Rows measured before are kept and
replaced one by one, in docs/blocks.json and docs/blocks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import graphprune
from graphprune import BlockFit
from tools._common import machine_line, markdown_table, versions_line, width_step, widths_line, write
from tools.bench_accuracy import DOCS, Task, task

SETTINGS: dict[str, BlockFit] = {
    "lr 0.003, 12 passes": BlockFit(passes=12, lr=0.003),
    "lr 0.01, 12 passes": BlockFit(passes=12, lr=0.01),
    "lr 0.03, 12 passes": BlockFit(passes=12, lr=0.03),
    "lr 0.01, 27 passes": BlockFit(passes=27, lr=0.01),
    "lr 0.03, 27 passes": BlockFit(passes=27, lr=0.03),
    "lr 0.01, 12 passes, one block after the other": BlockFit(passes=12, lr=0.01, together=False),
    "lr 0.01, 12 passes, outputs 3": BlockFit(passes=12, lr=0.01, outputs=3.0),
    "lr 0.01, 30 passes": BlockFit(),
}
SHIFT = 2
HEADER = """# Whole blocks fitted without labels

`recover="blocks"` after `recover="least_squares"`, from the same inputs without labels; plans by the criterion
"reconstruction", whole test sets. Error: of the outputs, squared, divided by the squares of the dense network's, on
the inputs that accuracy is measured on (for other networks than those on images: on inputs held from the repair).
Seconds of one processor, of both repairs. Widths: "that run well" are those of the default, `round_to="auto"`;
"any", of `round_to=1`, are most accurate for their multiply-accumulates. "blocks, augmented": the same images, in every
step each mirrored or not and shifted by up to two pixels (`BlockFit(augment=)`).

Written by `python -m tools.bench_blocks` ({machine}; {versions}).
"""
CHOICE = """
## Settings

Chosen on training images that the repair did not see, with networks and speed-ups that are in no table above; the dense
networks have seen these images in their training. One block after the other, each with all passes, takes as long as 27
passes with all at once, which are better.

ResNet-8 would have the learning rate of 0.03; with the 21 blocks of ResNet-44 that does harm, which is taken back
(ResNet-56 at 2x: the error on held inputs rose from 0.043 to 0.056), so it is 0.01.

Images that move in every step (mirrored or not, shifted by up to two pixels) are another matter than more passes:
ResNet-44 at 3x from 1,500 images, all other settings at their defaults.

Left out since they gave no less error there (ResNet-8 at 1.5x, 12 passes at lr 0.01, 0.0369 as it is): the outputs
alone, without the blocks (0.0383); convex mixtures of two inputs instead of inputs (0.0381); sums of streams compared
behind their ReLU (0.0370); and, of the outputs alone, the divergence of class probabilities at temperature 4 beside the
squares.
"""


def moved(images: Tensor) -> Tensor:
    """Each image mirrored or not, and shifted by up to `SHIFT` pixels, zeros coming in."""
    count, channels, height, width = images.shape
    chosen = torch.rand(count, 1, 1, 1) < 0.5
    padded = F.pad(torch.where(chosen, images.flip(-1), images), (SHIFT,) * 4)
    rows, columns = (torch.randint(2 * SHIFT + 1, (count, 1)) + torch.arange(size) for size in (height, width))
    every = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[(*every, rows[:, None, :, None], columns[:, None, None, :])]


def planned(made: Task, speedup: float, round_to: int | str) -> graphprune.plans.plan.Plan:
    budget = graphprune.Budget(macs=1 / speedup)
    data = made.data[: made.selection]
    return graphprune.plan(
        made.model, made.example, budget=budget, criterion="reconstruction", data=data, round_to=round_to,
        **made.options,
    )  # fmt: skip


def measured(
    made: Task, speedup: float, methods: dict[str, str | BlockFit], round_to: int | str
) -> list[dict[str, Any]]:
    """A row for each method, on one plan."""
    plan = planned(made, speedup, round_to)
    rows = []
    for name, method in methods.items():
        start = time.process_time()
        found = graphprune.recover(made.model, plan, made.example, made.data, method)
        seconds = time.process_time() - start
        said = found.layers[-1] if method != "least_squares" else None
        rows.append(
            {
                "method": name, "value": round(made.measure(found.model), 2), "error": error(made, found),
                "seconds": round(seconds), "kept": said is None or said.changed,
            }
        )  # fmt: skip
        print(rows[-1], said, flush=True)
    return rows


@torch.no_grad()
def error(made: Task, found: graphprune.Recovery) -> float:
    """Of the outputs on the inputs that are measured, where the task says which; else on held ones."""
    inputs = getattr(made.measure, "keywords", {}).get("x")
    if inputs is None:
        return round(found.after, 5)
    missed = whole = 0.0
    for batch in inputs.split(500):
        wanted = made.model(batch)
        missed += float((found.model(batch) - wanted).square().sum())
        whole += float(wanted.square().sum())
    return round(missed / whole, 5)


def table(rows: list[dict[str, Any]]) -> str:
    """All rows of one kind as a table."""
    headings = ["network", "speed-up", "widths", "inputs", "dense", "method", "after", "error of outputs", "seconds"]
    cells = [
        [
            r["model"], f"{r['speedup']:g}x", widths_line(r["round_to"]), f"{r['images']:,}",
            f"{r['dense']:.2f} {r['unit']}", r["method"],
            f"{r['value']:.2f}" + ("" if r["kept"] else " (taken back)"), f"{r['error']:.4f}", str(r["seconds"]),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(headings, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0])
    parser.add_argument("--images", type=int, default=1500, help="unlabelled inputs")
    parser.add_argument("--select-images", type=int, help="how many of them choose the channels; default all")
    parser.add_argument("--round-to", type=width_step, default="auto", help="as in graphprune.plan")
    parser.add_argument("--settings", action="store_true", help="compare settings on held-out training data")
    parser.add_argument("--weights", type=Path, help="a folder for trained networks, see tools.bench_accuracy")
    parser.add_argument("--augment", action="store_true", help="measure the fit on images that move, and it alone")
    parser.add_argument("--passes", type=int, help="with --augment, of the fit; default 30")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    methods: dict[str, str | BlockFit] = {"least squares": "least_squares", "blocks": "blocks"}
    if options.settings:
        methods = {"least squares": "least_squares", **SETTINGS}
        methods["lr 0.01, 30 passes, augmented"] = BlockFit(augment=moved)
    if options.augment:
        longer = "" if options.passes is None else f", {options.passes} passes"
        methods = {f"blocks, augmented{longer}": BlockFit(passes=options.passes or BlockFit.passes, augment=moved)}
    for name in options.models:
        made = task(name, options.images, options.settings, options.weights)
        images = sum(len(d["input_ids"]) if isinstance(d, dict) else len(d) for d in made.data)
        if options.select_images:
            made.selection = max(1, round(len(made.data) * options.select_images / images))
        dense = round(made.measure(made.model), 2)
        for speedup in options.speedups:
            about = {"model": name, "speedup": speedup, "images": images, "dense": dense, "unit": made.unit}
            about |= {"settings": options.settings, "round_to": options.round_to}
            keep([{**about, **row} for row in measured(made, speedup, methods, options.round_to)])


def keep(new: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same network, speed-up and method, and write the page."""
    target = DOCS / "blocks.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.is_file() else []
    fresh = {_key(row) for row in new}
    rows = [row for row in rows if _key(row) not in fresh] + new
    write(target, json.dumps(rows, indent=1))
    page = HEADER.format(machine=machine_line(torch.get_num_threads()), versions=versions_line("torch")) + "\n"
    page += table([row for row in rows if not row["settings"]]) + "\n"
    if chosen := [row for row in rows if row["settings"]]:
        page += CHOICE + "\n" + table(chosen) + "\n"
    write(DOCS / "blocks.md", page)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["speedup"], row["method"], row["settings"], row["round_to"]


if __name__ == "__main__":
    main()
