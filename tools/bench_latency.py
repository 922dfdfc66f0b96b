"""Latency budgets: what is asked for, predicted and reached in ONNX Runtime, and what it costs in importance.

    python -m tools.bench_latency                                     # everything that has no row yet
    python -m tools.bench_latency --networks resnet18 --threads 1 --parts budget
    python -m tools.bench_latency --report                            # writes the page from docs/latency.json

Parts: "budget" prunes to a requested speed-up and measures anew; "macs" looks for the budget of multiply-accumulates
whose network is as fast as that one, and compares how much importance the two keep; "ratio" measures networks pruned by
the same ratio by graphprune and by Torch-Pruning, by turns; "accuracy" compares latency and MACs plans of the trained
CIFAR-10 ResNet-56 (shared data folder) at equal measured latency, both repaired by least squares, no training;
"layers" does so with a latency plan that leaves layers out too. All other weights are random: latency does not depend
on them. YOLOv8n needs ultralytics.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

import graphprune
from graphprune.importance import resolve_criterion
from graphprune.importance.scorer import Scorer
from graphprune.planning.within_latency import width_step
from graphprune.plans.surgery import effective_folds
from tools import _peer
from tools._common import all_networks, build, classifier_of, example_for, machine_line, markdown_table, versions_line
from tools._common import write as write_file

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_s", "yolov8n")
PARTS = ("budget", "macs", "ratio", "accuracy", "layers")
SPEEDUPS, RATIOS, COMPARED = (1.5, 2.0), (0.3, 0.4, 0.5), ("resnet50", "mobilenet_v2")
RESULTS, OUTPUT = Path("docs/latency.json"), Path("docs/latency.md")
# A budget of multiply-accumulates is accepted when its network is this near to the other in time.
NEAR, TRIES = 0.01, 7
AROUND = (1.03, 0.97, 1.07, 0.93, 1.12, 0.88, 1.2, 0.8)
Row = dict[str, Any]
_TRAINED = "ResNet-56 on CIFAR-10, whole test set, least squares on 1,500 images, no training"


def network(name: str) -> tuple[nn.Module, Any]:
    """A network in eval mode and its example, batch 1."""
    if name == "vit_s":
        from torchvision.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        model = VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
        nn.init.normal_(model.heads.head.weight, std=0.02)
        return model.eval(), torch.randn(1, 3, 224, 224)
    if name in all_networks():
        return build(name), example_for(name)
    from ultralytics import YOLO

    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):
        model = YOLO(f"{name}.yaml").model
    return model.requires_grad_(True).eval(), torch.randn(1, 3, 320, 320)


class Timer:
    """Times networks in turns with one dense network, which is exported once."""

    def __init__(self, dense: nn.Module, example: Any, threads: int) -> None:
        self.example, self.threads = example, threads
        self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        self._count = 0
        self._dense = self._export(dense)

    def __call__(self, **models: nn.Module) -> dict[str, float]:
        """Median milliseconds of alternated calls, of the dense one too; measured apart from what plans measured."""
        files = {"dense": self._dense, **{name: self._export(model) for name, model in models.items()}}
        report = graphprune.benchmark(files, self.example, provider="cpu", threads=self.threads)
        return {row.model: row.median_ms for row in report.rows}

    def _export(self, model: nn.Module) -> Path:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.onnx"
        graphprune.export_onnx(model, self.example, path, dynamic_batch=False, check=False)
        return path


RANKED = "l2_folded"
"""What the page was measured with; another criterion needs all of its rows anew."""


class Importance:
    """How much of the importance of all units a plan keeps."""

    def __init__(self, model: nn.Module, example: Any, criterion: str = RANKED) -> None:
        self.graph = graphprune.trace(model, example)
        folds = [fold for fold, _ in effective_folds(model, self.graph.trace)]
        scorer = Scorer(model, folds, resolve_criterion(criterion), 0, True, None)
        self.scores = scorer(self.graph)

    def kept(self, plan: graphprune.Plan) -> float:
        total = lost = 0.0
        for group in self.graph.groups:
            scores, member = self.scores[group.index], group.members[0]
            gone = plan.removed.get(member.parameter, {}).get(member.axis, ())
            lost += float(scores[np.isin(member.positions, gone).all(1)].sum())
            total += float(scores.sum())
        return 1 - lost / total


def budget(name: str, threads: int, speedup: float) -> Row:
    """One requested speed-up: the way of the plan, and a measurement of its network."""
    model, example = network(name)
    plan, row = _planned(model, example, threads, speedup)
    small = plan.apply(model)
    graphprune.verify(model, small, plan, example).raise_on_failure()
    found = Timer(model, example, threads)(small=small)
    counts = [graphprune.count(m, example).macs for m in (model, small)]
    return {**row, "dense": found["dense"], "reached": found["dense"] / found["small"], "macs": counts[1] / counts[0]}


def _planned(model: nn.Module, example: Any, threads: int, speedup: float, **more: Any) -> tuple[graphprune.Plan, Row]:
    target = graphprune.Target(provider="cpu", threads=threads)
    more = {"criterion": RANKED, **more}
    plan = graphprune.plan(model, example, budget=graphprune.Budget(latency=1 / speedup), target=target, **more)
    assert plan.latency is not None
    attempts = [[a.limit_ms, a.predicted_ms, a.measured_ms] for a in plan.latency.attempts]
    return plan, {"attempts": attempts, "chosen": plan.latency.chosen}


def as_fast(make: Callable[[float], nn.Module], timer: Timer, wanted: float) -> tuple[float, float]:
    """The fraction of multiply-accumulates at which a network is `wanted` times as fast as the dense one, and its
    measured speed-up: the nearest one met by bisection, then on both sides of it, as widths that the machine does not
    like make the speed jump."""
    seen: dict[float, float] = {}

    def off(fraction: float) -> float:
        return abs(seen[fraction] / wanted - 1)

    def look(fraction: float) -> bool:
        try:
            found = timer(small=make(fraction))
        except graphprune.GraphPruneError:  # below the least that can stay
            return False
        seen[fraction] = found["dense"] / found["small"]
        return True

    low, high = 0.02, 1.0
    for _ in range(TRIES):
        middle = (low + high) / 2
        if not look(middle):
            low = middle
            continue
        if off(middle) < NEAR:
            return middle, seen[middle]
        low, high = (middle, high) if seen[middle] > wanted else (low, middle)
    around = min(seen, key=off, default=1.0)
    for factor in AROUND:
        if look(min(1.0, around * factor)) and off(min(1.0, around * factor)) < NEAR:
            break
    best = min(seen, key=off, default=1.0)
    return best, seen.get(best, 1.0)


def macs(name: str, threads: int, speedup: float) -> Row:
    """The importance that a latency plan and an equally fast MACs plan keep."""
    model, example = network(name)
    importance = Importance(model, example)
    plan, _ = _planned(model, example, threads, speedup)
    timer = Timer(model, example, threads)
    found = timer(small=plan.apply(model))
    wanted = found["dense"] / found["small"]
    plans: dict[float, graphprune.Plan] = {}

    def make(fraction: float) -> nn.Module:
        plans[fraction] = graphprune.plan(model, example, budget=graphprune.Budget(macs=fraction), criterion=RANKED)
        return plans[fraction].apply(model)

    fraction, reached = as_fast(make, timer, wanted)
    other = importance.kept(plans[fraction]) if fraction in plans else 1.0
    return {"latency": [wanted, importance.kept(plan)], "macs": [reached, other], "fraction": fraction}


def ratio(name: str, threads: int, share: float) -> Row:
    """Networks of both libraries at one ratio: ours with widths on the machine's stairs."""
    model, example = network(name)
    target = graphprune.Target(provider="cpu", threads=threads)
    ours = graphprune.prune(model, example, share, target=target)
    theirs = copy.deepcopy(model)
    _peer.prune_in_place(theirs, example, share, [n for n, m in model.named_modules() if m is classifier_of(model)])
    found = Timer(model, example, threads)(ours=ours, theirs=theirs)
    parameters = {k: sum(p.numel() for p in m.parameters()) for k, m in (("ours", ours), ("theirs", theirs))}
    step = width_step(model, example, target)
    return {**found, "step": step, "parameters": [parameters["ours"], parameters["theirs"]]}


def accuracy(
    name: str,
    threads: int,
    speedup: float,
    criterion: str = "reconstruction",
    granularity: Sequence[str] | str = "auto",
) -> Row:
    """Top-1 of the trained ResNet-56, pruned to a latency and to multiply-accumulates (widths alone) as fast as that,
    or as near as they come."""
    from tools.bench_accuracy import task

    made = task(name, 1500, False)
    chosen: dict[str, Any] = {"criterion": criterion, "data": list(made.data[0].split(25))}
    plan, row = _planned(made.model, made.example, threads, speedup, granularity=granularity, **chosen)
    timer = Timer(made.model, made.example, threads)
    found = timer(small=plan.apply(made.model))
    wanted = found["dense"] / found["small"]
    plans: dict[float, graphprune.Plan] = {}

    def make(fraction: float) -> nn.Module:
        limit = graphprune.Budget(macs=fraction)
        plans[fraction] = graphprune.plan(made.model, made.example, budget=limit, **chosen)
        return plans[fraction].apply(made.model)

    fraction, reached = as_fast(make, timer, wanted)
    out: Row = {**row, "fraction": fraction, "dense": found["dense"], "layers": len(plan.layers)}
    for key, value, speed in (("latency", plan, wanted), ("macs", plans[fraction], reached)):
        repaired = graphprune.recover(made.model, value, made.example, made.data).model
        out[key] = [speed, made.measure(repaired)]
    return out


def layers(name: str, threads: int, speedup: float) -> Row:
    """`accuracy` with a latency plan that leaves layers out too. Channels go by their norms in both: reconstruction
    would score every number of layers anew, for seconds each, while the machine is kept free for timing."""
    return accuracy(name, threads, speedup, RANKED, ["layer", "channels"])


def jobs(options: argparse.Namespace) -> list[tuple[str, str, int, float]]:
    """(part, network, threads, speed-up or ratio) of everything asked for."""
    out: list[tuple[str, str, int, float]] = []
    for threads in options.threads:
        for name in options.networks:
            out += [("budget", name, threads, s) for s in SPEEDUPS]
            if threads == 1:
                out.append(("macs", name, 1, SPEEDUPS[-1]))
                out += [("ratio", name, 1, r) for r in RATIOS if name in COMPARED]
    if 1 in options.threads:
        out += [("accuracy", "resnet56", 1, s) for s in SPEEDUPS]
        out.append(("layers", "resnet56", 1, SPEEDUPS[-1]))
    return [job for job in out if job[0] in options.parts]


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def budget_table(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        _, predicted, measured = r["attempts"][r["chosen"]]
        first = r["attempts"][0]
        lines.append(
            [
                r["network"],
                str(r["threads"]),
                f"{r['dense']:.2f}",
                f"{r['value']:g}x",
                f"{r['reached']:.2f}x ({percent(r['reached'] / r['value'] - 1)})",
                f"{first[1]:.2f} / {first[2]:.2f} ({percent(first[1] / first[2] - 1)})",
                f"{predicted:.2f} / {measured:.2f} ({percent(predicted / measured - 1)})",
                str(len(r["attempts"])),
                f"{r['macs']:.0%}",
            ]
        )
    heads = "network|threads|dense, ms|asked|reached|first: predicted / measured, ms|chosen: predicted / measured, ms"
    return markdown_table([*heads.split("|"), "attempts", "MACs left"], lines)


def _alike(row: Row) -> bool:
    """Whether both plans of a row are about as fast, or that by MACs is the faster one."""
    return bool(row["macs"][0] > 0.95 * row["latency"][0])


def page(rows: Sequence[Row]) -> str:
    """The Markdown page."""
    by = {part: [r for r in rows if r["part"] == part] for part in PARTS}
    parts = ["# Latency budgets", (__doc__ or "").split("\n\n", 2)[2].strip(), "    python -m tools.bench_latency"]
    packages = "torch torchvision onnx ultralytics torch-pruning".split()
    versions = f"{versions_line(*packages)}, onnxruntime {onnxruntime.__version__}"
    parts.append(f"{machine_line(1)}. {versions}. Batch 1, 224 x 224 (YOLOv8n: 320 x 320).")
    if by["budget"]:
        first = [abs(r["attempts"][0][1] / r["attempts"][0][2] - 1) for r in by["budget"]]
        chosen = [abs(r["attempts"][r["chosen"]][1] / r["attempts"][r["chosen"]][2] - 1) for r in by["budget"]]
        within = sum(-0.03 <= r["reached"] / r["value"] - 1 <= 0.15 for r in by["budget"])
        parts += [
            "## Asked for and reached",
            "*Reached* is measured by `graphprune.benchmark` after the plan was made, in a run of its own. *First* is "
            "the plan made before anything but the dense network was measured as a whole.",
            budget_table(by["budget"]),
            f"Within -3 % and +15 % of what was asked for: {within} of {len(by['budget'])}. Median error of the "
            f"prediction: {statistics.median(first):.1%} of the first plans, {statistics.median(chosen):.1%} of the "
            f"chosen ones; largest {max(first):.1%} and {max(chosen):.1%}.",
        ]
    if by["macs"]:
        lines = [
            [
                r["network"],
                *(f"{v[0]:.2f}x" for v in (r["latency"], r["macs"])),
                *(f"{v[1]:.1%}" for v in (r["latency"], r["macs"])),
                f"{100 * (r['latency'][1] - r['macs'][1]):+.2f} points" if _alike(r) else "none is as fast",
            ]
            for r in by["macs"]
        ]
        heads = "network|latency plan, speed-up|MACs plan, speed-up|importance kept by latency|by MACs|difference"
        text = (
            "The MACs budget whose network is nearest in time. Time jumps from one budget to the next, because of "
            "widths that the machine does not like, so some are faster than the latency plan, and keep less for that "
            "too. *None is as fast*: fewer multiply-accumulates only made it slower."
        )
        title = "## Latency plan against MACs plan, as nearly equal in time as can be"
        parts += [title, markdown_table(heads.split("|"), lines), text]
    if by["accuracy"]:
        lines = [
            [f"{r['value']:g}x", *(f"{v[0]:.2f}x: {v[1]:.2f} %" for v in (r["latency"], r["macs"]))]
            for r in by["accuracy"]
        ]
        columns = ["asked", "latency plan: reached, top-1", "MACs plan: reached, top-1"]
        parts += [f"{_TRAINED}, widths alone:", markdown_table(columns, lines)]
    if by["layers"]:
        lines = [
            [
                f"{r['value']:g}x",
                str(r["layers"]),
                *(f"{v[0]:.2f}x: {v[1]:.2f} %" for v in (r["latency"], r["macs"])),
                f"{r['fraction']:.0%}",
            ]
            for r in by["layers"]
        ]
        heads = "asked|layers left out|latency plan: reached, top-1|nearest MACs plan of widths: reached, top-1"
        text = (
            f"{_TRAINED}; the latency plan may leave out layers (of 27 blocks) besides narrowing the others, the other "
            "one narrows alone; channels by their L2 norm in both:"
        )
        parts += [text, markdown_table([*heads.split("|"), "its MACs budget"], lines)]
    if by["ratio"]:
        lines = [
            [
                r["network"],
                f"{r['value']:g}",
                f"{r['dense']:.2f}",
                *(f"{r[k]:.2f} ({p / 1e6:.2f} M)" for k, p in zip(("ours", "theirs"), r["parameters"], strict=True)),
                f"{r['theirs'] / r['ours']:.2f}",
            ]
            for r in by["ratio"]
        ]
        step = by["ratio"][0]["step"]
        heads = "network|ratio|dense, ms|graphprune, ms (parameters)|Torch-Pruning, ms (parameters)|times faster"
        text = f"graphprune rounds to the step of {step} channels that the table found on this machine."
        parts += ["## Equal ratio, by turns", text, markdown_table(heads.split("|"), lines)]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    work = {"budget": budget, "macs": macs, "ratio": ratio, "accuracy": accuracy, "layers": layers}
    for part, name, threads, value in [] if options.report else jobs(options):
        key = {"part": part, "network": name, "threads": threads, "value": value}
        old = [r for r in rows if all(r[k] == v for k, v in key.items())]
        if old and not options.again:
            continue
        row = {**key, **work[part](name, threads, value)}
        rows = [r for r in rows if r not in old] + [row]
        rows.sort(key=lambda r: (PARTS.index(r["part"]), r["threads"], (*NETWORKS, "resnet56").index(r["network"])))
        write_file(RESULTS, json.dumps(rows, indent=0) + "\n")
        print(row, flush=True)
    write_file(OUTPUT, page(rows))
    print(f"written: {OUTPUT}")


if __name__ == "__main__":
    main()
