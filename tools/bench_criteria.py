"""Which criterion keeps most without any data: each alone, and with the mean correction from stored statistics.

    python -m tools.bench_criteria                       # the networks that the default was chosen on
    python -m tools.bench_criteria --models resnet56 --speedups 2

Reads the trained networks and data of GRAPHPRUNE_SHARED_DATA and writes docs/criteria.md and docs/criteria.json, row by
row. Figures are of data kept apart from those that other pages publish: the last 2,000 of 24,000 training images
(ResNets, whose dense networks have seen them), the first half of the keywords, the second third of the development
sentences (MiniLM). DnCNN has no such data here: its figures are those of Set12. Torch-Pruning cuts to the uniform ratio
that reaches the same budget. Rows with a scope are of ratios, the least that reach the speed-up; the others of budgets.
Every width is allowed (round_to=1), so that criteria are compared and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.importance import with_options
from tools._common import markdown_table, write
from tools.bench_accuracy import (
    DOCS,
    Task,
    _importances,
    _peer_version,
    loaders,
    task,
    torch_pruning_ratio,
    torch_pruning_result,
)
from tools.bench_one_line import attempted, ratio_for

CRITERIA: dict[str, Any] = {
    **{name: name for name in ("flow", "l1", "l2", "l2_folded", "lamp", "bn_scale", "fpgm")},
    "flow, every group scaled to mean 1": with_options("flow", normaliser="mean"),
}
SCOPES = {f"flow, ratio, scope {scope!r}": scope for scope in ("local", "isomorphic", "global")}
CHOSEN_ON = ("resnet20", "resnet8", "dscnn", "dncnn", "minilm")
PEER = "Torch-Pruning"
TARGET = DOCS / "criteria.json"


def kept_apart(name: str) -> Task:
    """The task with a measure that no published figure uses."""
    made = task(name, 64, name == "minilm")
    shared = loaders()
    if name == "dscnn":
        x, y = shared.keywords()
        x, y = x[: len(x) // 2], y[: len(x) // 2]
    elif name.startswith("resnet"):
        x, y = shared.cifar10("train", limit=24000, raw=name == "resnet8")
        x, y = x[-2000:], y[-2000:]
    else:
        return made
    made.measure = lambda net: float(shared.top1(net, x, y))
    return made


def rows_of(name: str, made: Task, speedup: float, methods: Collection[str]) -> Iterator[dict[str, Any]]:
    """One row per method; Torch-Pruning is one of them."""
    dense = graphprune.count(made.model, made.example).macs

    def row(method: str, alone: nn.Module, repaired: nn.Module | None) -> dict[str, Any]:
        reached = dense / graphprune.count(alone, made.example).macs
        return {
            "model": name, "unit": made.unit, "speedup": speedup, "method": method, "reached": round(reached, 2),
            "alone": round(made.measure(alone), 2),
            "mean": None if repaired is None else round(made.measure(repaired), 2),
        }  # fmt: skip

    ratio = torch_pruning_ratio(made, speedup) if PEER in methods else 0.0
    for label, importance in _importances().items() if PEER in methods else ():
        small = attempted(functools.partial(torch_pruning_result, made, ratio, importance))
        if small is not None and dense / graphprune.count(small, made.example).macs >= 0.95 * speedup:
            yield row(f"Torch-Pruning, {label}", small, None)
    asked: dict[str, dict[str, Any]] = {
        method: {"budget": graphprune.Budget(macs=1 / speedup), "criterion": criterion}
        for method, criterion in CRITERIA.items()
    } | {method: {"scope": scope} for method, scope in SCOPES.items()}
    for method, arguments in asked.items():
        if method not in methods:
            continue
        options = {**made.options, **arguments, "round_to": 1}
        try:
            if method in SCOPES:
                options["ratio"] = ratio_for(made, dense / speedup, options)
            plan = graphprune.plan(made.model, made.example, **options)
        except graphprune.GraphPruneError as error:
            print(f"{name}, {method}: {error}", flush=True)
            continue
        found = graphprune.recover(made.model, plan, made.example, method="mean")
        known = any(layer.note.startswith("from stored") for layer in found.layers)
        yield row(method, plan.apply(made.model), found.model if known else None)


def page(rows: list[dict[str, Any]]) -> str:
    """One table per network: alone / with the mean correction."""
    about = f"{os.cpu_count()} cores, CPU, 1 thread; Python {platform.python_version()}, torch {torch.__version__}"
    parts = [
        "# Criteria without data\n",
        "What is left of a trained network that is cut to a budget of multiply-accumulates by each criterion that\n"
        'needs no data: as cut, and behind the slash with `recover="mean"` from stored statistics (where there are\n'
        "any). No training. The data are kept apart from those that other pages publish, see the tool; DnCNN's are\n"
        "Set12.\n",
        f"    python -m tools.bench_criteria\n\nMeasured on: {about}, Torch-Pruning {_peer_version()}.\n",
        NOTES,
    ]
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        speeds = sorted({r["speedup"] for r in mine})
        parts.append(f"\n## {name} ({mine[0]['unit']}, dense {mine[0]['dense']:.2f})\n")
        table = []
        for method in dict.fromkeys(r["method"] for r in mine):
            cells = {r["speedup"]: r for r in mine if r["method"] == method}
            table.append([method, *(_cell(cells.get(s)) for s in speeds)])
        parts.append(markdown_table(["criterion", *(f"{s:g}x" for s in speeds)], table))
    return "\n".join(parts) + "\n"


NOTES = """The default is "flow", sd(x) |w|^2, shares summed over the layers that read a group. It was chosen in trials
of 15 products sd(x)^b |filter|^a |w|^2 (a and b of 0, 1/2, 1, and second moments in place of variances) with shares
summed or averaged over readers, scores scaled per group, and uniform ratios, by scripts that are not kept. What they
showed:

- Shares summed over the layers that read a group decide more than the product does (the last row of each table: the
  same with scores scaled to the same mean in every group). Scaled scores make a residual stream, which saves much and
  hurts everything, as cheap as a layer inside one block.
- Ratios of all channels together (scope "global") take the wide layers at the end of ResNets, which are cheap, and need
  far more channels for the same budget; DS-CNN, all of whose layers are equally wide, gains from it. A ratio's repaired
  network at 2x can be worse than the cut one (DS-CNN). Repaired, budgets beat all three scopes in eight of nine cases.
- Means alone leave networks whose signal fades from layer to layer. Restoring variances behind batch norms too
  ("moments", the default repair without data), ResNet-20 keeps 92.5, 81.1, 54.9 at 1.3x, 1.5x, 2x instead of 91.3,
  76.8, 46.1 (budgets, widths of "auto"), ResNet-8 66.4, 45.0, 23.3 instead of 66.1, 37.0, 20.4, DS-CNN 85.2, 59.2, 39.8
  instead of 84.2, 53.0, 37.4; restoring a quarter, half or three quarters of it (in the exponent) gives less.
- Behind layer norms a feature is taken to have mean 0 and variance 1 before scale and shift, which carried through GELU
  gives the neurons of MiniLM's MLPs a standard deviation: 86.6, 85.3, 83.8 at 1.3x, 1.5x, 2x on all 1,500 pairs of the
  development split (dense 86.7), against 85.6, 84.6, 83.3 with standard deviations of 1. Means assumed like that do
  not repair: 86.5, 83.8, 78.9.
- The weights of the next layer say more than those of the filter; folded filters are the worst everywhere.
- The standard deviation counts in networks with nearly constant channels (DnCNN).
- The filter's own norm as a further factor helps networks trained with weight decay a little and ruins DnCNN, whose
  filters are the longer the less their channels vary. It is left out.
"""


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['alone']:.2f}" if row["mean"] is None else f"{row['alone']:.2f} / {row['mean']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CHOSEN_ON))
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.3, 1.5, 2.0])
    parser.add_argument("--methods", nargs="+", default=[PEER, *CRITERIA, *SCOPES])
    parser.add_argument("--page", action="store_true", help="only write the page from what is there")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in [] if options.page else options.models:
        made = kept_apart(name)
        dense = round(made.measure(made.model), 2)
        for speedup in options.speedups:
            for new in rows_of(name, made, speedup, options.methods):
                print(new, flush=True)
                keep({**new, "dense": dense})
    write(DOCS / "criteria.md", page(json.loads(TARGET.read_text())))


def keep(new: dict[str, Any]) -> None:
    """Add a row, in the place of an earlier one of the same kind."""
    rows: list[dict[str, Any]] = json.loads(TARGET.read_text()) if TARGET.is_file() else []
    key = ("model", "speedup", "method")
    rows = [r for r in rows if [r[k] for k in key] != [new[k] for k in key]] + [new]
    write(Path(TARGET), json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
