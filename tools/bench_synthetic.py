"""Accuracy after pruning without any data: channels chosen and layers refitted on inputs made from the network itself.

    python -m tools.bench_synthetic                                             # what is on the page but the curve
    python -m tools.bench_synthetic --models resnet20 --speedups 2 --steps 10 25 50    # the curve
    python -m tools.bench_synthetic --models resnet20 --inputs made --blocks    # the column of fitted blocks
    python -m tools.bench_synthetic --models resnet32 --held-out                # how settings were looked for

Reads the trained networks and data of GRAPHPRUNE_SHARED_DATA (else ../shared/data beside the checkout) and writes
docs/no-data.md and docs/no-data.json, row by row. `graphprune.plan` with the criterion "reconstruction" within a budget
of multiply-accumulates, then `graphprune.recover` by least squares, both on the same inputs: made by
`graphprune.synthesize` with its defaults, normal noise, or real ones without labels; with --blocks, from made ones, by
"blocks" as well. The example input is noise too. Whole test sets; nothing is trained. Seconds are CPU time of one
thread. With --keep inputs are made once, and the seconds are those of the runs that made them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphprune
from graphprune.support.files import make_folder
from tools._common import width_step, widths_line, write
from tools.bench_accuracy import DOCS, Task, task

TARGET = DOCS / "no-data.json"
PAGE = DOCS / "no-data.md"
PAGES: dict[str, tuple[float, ...]] = {
    "resnet20": (1.5, 2.0), "resnet56": (1.5, 2.0), "resnet8": (1.5, 2.0), "dscnn": (1.5, 2.0), "dncnn": (1.5, 2.0)
}  # fmt: skip
SHAPES = {"dscnn": (1, 49, 10), "dncnn": (1, 32, 32)}
FEWER = {"dncnn": 64}  # inputs of networks that take long
KINDS = ("made", "noise", "real")


def inputs_of(
    name: str, made: Task, kind: str, n: int, steps: int, seed: int, keep: Path | None
) -> tuple[Sequence[Any], float, dict[str, Any]]:
    """Batches, CPU seconds for them, and what else is said of them."""
    shape = SHAPES.get(name, (3, 32, 32))
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return list(torch.randn((n, *shape), generator=generator).split(128)), 0.0, {}
    if kind == "real":
        return list(torch.cat(list(made.data))[:n].split(128)), 0.0, {}
    example = torch.randn((2, *shape), generator=generator)
    path = None if keep is None else make_folder(keep) / f"{name}-{n}-{steps}-{seed}.safetensors"
    with Clock(path) as clock:
        found = graphprune.synthesize(made.model, example, n, steps=steps, seed=seed, path=path)
    return found, clock.seconds, {"before": found.before, "after": found.after}


class Clock:
    """CPU seconds that making took. Of inputs that are kept, those of all runs until they were done; NaN where one of
    these runs was not timed, or killed."""

    def __init__(self, path: Path | None) -> None:
        self.path = None if path is None else path.with_suffix(".seconds.json")
        begun = path is not None and path.is_file()
        known = json.loads(self.path.read_text()) if self.path is not None and self.path.is_file() else {}
        self.seconds: float = known.get("seconds", math.nan) if begun else 0.0
        self.done: bool = begun and known.get("done", False)

    def __enter__(self) -> Clock:
        self._note(math.nan, False)
        self._start = time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.done:
            self.seconds += time.process_time() - self._start
            self._note(self.seconds, kind is None)

    def _note(self, seconds: float, done: bool) -> None:
        if self.path is not None and not self.done:
            write(self.path, json.dumps({"seconds": seconds, "done": done}))


def blocks_of(made: Task, plan: graphprune.Plan, example: Tensor, data: Sequence[Any]) -> dict[str, Any]:
    """What is reached where blocks are fitted after least squares, whether that stayed, and the seconds of both."""
    start = time.process_time()
    found = graphprune.recover(made.model, plan, example, data, "blocks")
    seconds = round(time.process_time() - start)
    stayed = found.layers[-1].changed
    return {"blocks": round(made.measure(found.model), 2), "blocks_stayed": stayed, "blocks_seconds": seconds}


def rows_of(
    name: str,
    made: Task,
    speedups: Sequence[float],
    asked: dict[str, Any],
    keep: Path | None,
    blocks: bool,
    round_to: int | str,
) -> Iterator[dict[str, Any]]:
    """A row for each speed-up, on the same inputs."""
    data, seconds, more = inputs_of(name, made, **asked, keep=keep)
    chosen: dict[str, Any] = {"criterion": "reconstruction", "data": data, "round_to": round_to}
    example: Tensor = torch.randn(2, *SHAPES.get(name, (3, 32, 32)), generator=torch.Generator().manual_seed(0))
    dense = graphprune.count(made.model, example).macs
    for speedup in speedups:
        start = time.process_time()
        budget = graphprune.Budget(macs=1 / speedup)
        plan = graphprune.plan(made.model, example, budget=budget, **chosen)
        small = graphprune.recover(made.model, plan, example, data, "least_squares").model
        pruning = time.process_time() - start
        fitted = blocks_of(made, plan, example, data) if blocks and asked["kind"] == "made" else {}
        yield {
            "model": name, "unit": made.unit, "speedup": speedup, "round_to": round_to, "inputs": asked["kind"],
            "n": asked["n"],
            "steps": asked["steps"] if asked["kind"] == "made" else 0, "seed": asked["seed"],
            "value": round(made.measure(small), 2), "making": None if math.isnan(seconds) else round(seconds),
            "pruning": round(pruning), **fitted,
            "reached": round(dense / graphprune.count(small, example).macs, 3),
            **{key: round(value, 4) for key, value in more.items()},
        }  # fmt: skip


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """What is left with each kind of inputs."""
    lines = [
        "| network (unit, dense) | asked | widths | inputs | made | made, blocks fitted "
        "| seconds of making, of fitting | noise | real, unlabelled |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    shown = [r for r in rows if r["seed"] == 0 and (r["inputs"] != "made" or r["steps"] == steps)]
    for key in dict.fromkeys((r["model"], r["speedup"], r["round_to"]) for r in shown):
        mine = {r["inputs"]: r for r in shown if (r["model"], r["speedup"], r["round_to"]) == key}
        first = mine.get("made") or next(iter(mine.values()))
        values = {kind: f"{mine[kind]['value']:.2f}" if kind in mine else "" for kind in KINDS}
        made = mine.get("made", {})
        fitted = f"{made['blocks']:.2f}" if "blocks" in made else ""
        fitted += "" if made.get("blocks_stayed", True) else " (taken back)"
        seconds = ", ".join(str(made[name]) for name in ("making", "blocks_seconds") if made.get(name) is not None)
        lines.append(
            f"| {key[0]} ({first['unit']}, {first['dense']:.2f}) | {key[1]:g}x | {widths_line(key[2])} | {first['n']} "
            f"| {values['made']} | {fitted} | {seconds} | {values['noise']} | {values['real']} |"
        )
    return "\n".join(lines)


def curve(rows: list[dict[str, Any]]) -> str:
    """Accuracy against time spent on making."""
    lines = [
        "| network | asked | steps | inputs | seconds of making | divergence at batch norms | value |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    made = [r for r in rows if r["inputs"] == "made" and r["seed"] == 0 and r["round_to"] == "auto"]
    several = {(r["model"], r["speedup"]) for r in made if any(_differs(r, o) for o in made)}
    for r in sorted(made, key=lambda r: (r["model"], r["speedup"], r["n"], r["steps"])):
        if (r["model"], r["speedup"]) in several:
            lines.append(
                f"| {r['model']} | {r['speedup']:g}x | {r['steps']} | {r['n']} | {r['making'] or ''} | "
                f"{r['before']:.3f} -> {r['after']:.3f} | {r['value']:.2f} |"
            )
    return "\n".join(lines) if several else ""


def _differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(one[key] == other[key] for key in ("model", "speedup"))
    return same and (one["steps"], one["n"]) != (other["steps"], other["n"])


HEADER = """# No data: measured

Pruned within a budget of multiply-accumulates with nothing but the network at hand, beside noise and real inputs
without labels, as many of each (of DS-CNN's real keywords the 500 that are not measured on); whole test sets else, no
training. The criterion is "reconstruction", the repair least squares, both on the same inputs. "made": by
`graphprune.synthesize` with its defaults, from batch norms alone; how is said in
[no data, unlabelled data, training](guide/no-data.md). Settings were chosen by how well layers that were fitted to made
inputs do on training images, with another network (ResNet-32). "blocks fitted": `recover="blocks"` on the made inputs,
where that was tried; "taken back": it was no better on made inputs that were held from it, and the network is as least
squares left it. Seconds are CPU time of one thread on a busy machine. Widths: "that run well" are those of the default,
`round_to="auto"`; "any", of `round_to=1`, are most accurate for their multiply-accumulates.

Written by `python -m tools.bench_synthetic` ({machine}; {versions}).

"""


def page(rows: list[dict[str, Any]], steps: int) -> str:
    """The whole page."""
    machine = f"{os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    text = HEADER.format(machine=machine, versions=versions) + table(rows, steps) + "\n"
    spent = curve(rows)
    return text + (f"\n## Accuracy against time spent on making inputs\n\n{spent}\n" if spent else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PAGES))
    parser.add_argument("--speedups", nargs="+", type=float)
    parser.add_argument("--inputs", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--images", type=int, default=512)
    default = graphprune.Synthetic().steps
    parser.add_argument("--steps", nargs="+", type=int, default=[default])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round-to", type=width_step, default="auto", help="as in graphprune.plan")
    parser.add_argument("--keep", type=Path, help="folder for made inputs, to go on from")
    parser.add_argument("--blocks", action="store_true", help="on made inputs fit blocks as well")
    parser.add_argument("--held-out", action="store_true", help="measure on held-out training images, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in options.models:
        n = min(options.images, FEWER.get(name, options.images))
        made = task(name, n * 4 if name == "dncnn" else n, options.held_out)
        dense = round(made.measure(made.model), 2)
        speedups = options.speedups or PAGES.get(name, (2.0,))
        for kind in options.inputs:
            for steps in options.steps if kind == "made" else options.steps[:1]:
                asked = {"kind": kind, "n": n, "steps": steps, "seed": options.seed}
                for row in rows_of(
                    name, made, speedups, asked, options.keep, options.blocks, options.round_to
                ):
                    row["dense"] = dense
                    print(row, flush=True)
                    if not options.held_out:
                        _keep(row, default)


def _keep(row: dict[str, Any], steps: int) -> None:
    """Put a row in the place of the one of its kind, and write the page."""
    rows: list[dict[str, Any]] = json.loads(TARGET.read_text()) if TARGET.is_file() else []
    keys = ("model", "speedup", "round_to", "inputs", "n", "steps", "seed")
    old = next((r for r in rows if all(r[key] == row[key] for key in keys)), {})
    if row["making"] is None:
        row["making"] = old.get("making")
    rows = [r for r in rows if r is not old] + [row]
    order = list(PAGES)
    rows.sort(key=lambda r: (order.index(r["model"]) if r["model"] in order else len(order), r["speedup"]))
    write(TARGET, json.dumps(rows, indent=1))
    write(PAGE, page(rows, steps))


if __name__ == "__main__":
    main()
