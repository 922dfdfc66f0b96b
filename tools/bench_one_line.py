"""`graphprune.prune(model, x, ...)` without any data beside Torch-Pruning's data-free criteria, on whole test sets.

    python -m tools.bench_one_line                              # eight networks, 1.3x, 1.5x, 2x
    python -m tools.bench_one_line --models resnet56 --speedups 2

Reads the trained networks and data of GRAPHPRUNE_SHARED_DATA and writes docs/one-line.md and docs/one-line.json, row by
row. "budget" is `prune(model, x, budget=Budget(macs=1 / speedup))`, "ratio" is `prune(model, x, r)` with the least
ratio that reaches the speed-up, both with all other arguments at their defaults. MiniLM's embeddings and residual
stream stay, and under "ratio" its heads too, as Torch-Pruning can only cut the neurons; "heads too" cuts both.
Torch-Pruning gets the least uniform ratio that reaches the speed-up, and of its four data-free criteria the best
counts, chosen on the very test set. Where one side's least ratio overshoots the speed-up by more than 2.5 %, the other
gets as few multiply-accumulates. Nothing is trained, and nobody sees data.

Differences are paired: by image, keyword or sentence pair. Two standard errors are those of the mean difference, for
Spearman's correlation those of 200 bootstrap samples of the pairs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import graphprune
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

MODELS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet8", "dscnn", "dncnn", "minilm")
TARGET = DOCS / "one-line.json"
OURS = {"budget": "graphprune, budget", "ratio": "graphprune, ratio"}
HEADS = "graphprune, ratio, heads too"
_SLACK = 1.025
Parts = np.ndarray[Any, Any]


class Measure:
    """What a network makes of every sample of the test set, and figures of that."""

    def __init__(self, name: str) -> None:
        shared = loaders()
        self.name, self.shared = name, shared
        if name.startswith("resnet"):
            self.x, self.y = shared.cifar10("test", raw=name == "resnet8")
        elif name == "dscnn":
            self.x, self.y = shared.keywords()
        elif name == "dncnn":
            self.images = shared.set12()
        else:
            self.pairs, self.tokenizer = shared.stsb("test"), shared.minilm()[1]

    @torch.inference_mode()
    def parts(self, model: nn.Module) -> Parts:
        """One number per sample: 0 or 100 for a class, decibels for an image, the similarity for a pair."""
        if self.name == "dncnn":
            return np.array([self._psnr(model, x, number) for number, x in enumerate(self.images)])
        if self.name == "minilm":
            return self._similarities(model)
        hits = [model(x).argmax(1) == y for x, y in zip(self.x.split(250), self.y.split(250), strict=True)]
        return 100.0 * torch.cat(hits).numpy()

    def _psnr(self, model: nn.Module, x: torch.Tensor, seed: int) -> float:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 25 / 255
        return float(10 * torch.log10(1 / ((model(x + noise).clamp(0, 1) - x) ** 2).mean()))

    def _similarities(self, model: nn.Module) -> Parts:
        found: list[Any] = []
        vectors = [self._embedded(model, [pair[i] for pair in self.pairs]) for i in (0, 1)]
        found = (vectors[0] * vectors[1]).sum(1).tolist()
        return np.array(found)

    def _embedded(self, model: nn.Module, texts: list[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            batch = self.tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
            pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            for i, vector in zip(chosen, pooled, strict=True):
                out[i] = vector
        return torch.stack(out)

    def figure(self, parts: Parts) -> float:
        """Of the whole test set."""
        if self.name == "minilm":
            return float(100 * spearmanr(parts, [pair[2] for pair in self.pairs])[0])
        return float(parts.mean())

    def difference(self, a: Parts, b: Parts) -> tuple[float, float]:
        """figure(a) - figure(b), and two standard errors of it."""
        difference = self.figure(a) - self.figure(b)
        if self.name != "minilm":
            return difference, float(2 * (a - b).std(ddof=1) / np.sqrt(len(a)))
        rng, scores = np.random.default_rng(0), np.array([pair[2] for pair in self.pairs])
        drawn = []
        for _ in range(200):
            i = rng.integers(0, len(scores), len(scores))
            drawn.append(100 * float(spearmanr(a[i], scores[i])[0] - spearmanr(b[i], scores[i])[0]))
        return difference, float(2 * np.std(drawn, ddof=1))


def ratio_for(made: Task, most: float, options: dict[str, Any]) -> float:
    """The least ratio, to three digits, with which `prune` leaves at most so many multiply-accumulates."""
    low, high = 0, 950
    while high - low > 1:
        middle = (low + high) // 2
        plan = graphprune.plan(made.model, made.example, middle / 1000, **options)
        fits = graphprune.count(plan.apply(made.model), made.example).macs <= most
        low, high = (low, middle) if fits else (middle, high)
    return high / 1000


def rows_of(name: str, made: Task, measure: Measure, speedup: float) -> Iterator[dict[str, Any]]:
    """The best of Torch-Pruning, then ours."""
    dense = graphprune.count(made.model, made.example).macs
    head = {"model": name, "unit": made.unit, "speedup": speedup}

    def reached(model: nn.Module) -> float:
        return round(dense / graphprune.count(model, made.example).macs, 3)

    def peer_at(speedup: float) -> tuple[dict[str, Any], Parts]:
        """What is said of the best of Torch-Pruning at this speed-up, and what it makes of every sample."""
        ratio = torch_pruning_ratio(made, speedup)
        peers: dict[str, tuple[nn.Module, Parts]] = {}
        for label, importance in _importances().items():
            small = attempted(functools.partial(torch_pruning_result, made, ratio, importance))
            if small is not None and reached(small) >= 0.98 * speedup:
                peers[label] = small, measure.parts(small)
        best = max(peers, key=lambda label: measure.figure(peers[label][1]))
        told = {
            "best": best, "every": {label: round(measure.figure(parts), 2) for label, (_, parts) in peers.items()},
            "ratio": round(ratio, 4), "reached": reached(peers[best][0]),
            "figure": round(measure.figure(peers[best][1]), 2),
        }  # fmt: skip
        return told, peers[best][1]

    usual, theirs = peer_at(speedup)
    aim = speedup if usual["reached"] <= _SLACK * speedup else usual["reached"]
    yield {**head, "method": "Torch-Pruning", **usual}
    asked: dict[str, dict[str, Any]] = {OURS["budget"]: {"budget": graphprune.Budget(macs=1 / aim), **made.options}}
    asked[OURS["ratio"]] = {**made.options, "granularity": "mlp"} if name == "minilm" else made.options
    if name == "minilm":
        asked[HEADS] = made.options
    for method, options in asked.items():
        share = None
        if "budget" not in options:
            share = ratio_for(made, dense / aim, options)
            options = {"ratio": share, **options}
        plan = graphprune.plan(made.model, made.example, **options)
        cut = measure.parts(plan.apply(made.model))
        small = graphprune.prune(made.model, made.example, **options)
        mine = measure.parts(small)
        told, other = usual, theirs
        if reached(small) > _SLACK * usual["reached"]:
            told, other = peer_at(reached(small))
        difference, error = measure.difference(mine, other)
        yield {
            **head, "method": method, "reached": reached(small), "figure": round(measure.figure(mine), 2),
            "against": [told["figure"], told["best"], told["reached"]],
            "cut": round(measure.figure(cut), 2), "ratio": share, "difference": round(difference, 2),
            "two_errors": round(error, 2),
        }  # fmt: skip


def attempted(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Torch-Pruning's network; None, and a line that says why, where it fails."""
    try:
        return make()
    except Exception as error:
        print(f"Torch-Pruning: {type(error).__name__}: {error}", flush=True)
        return None


def page(rows: list[dict[str, Any]]) -> str:
    about = f"{os.cpu_count()} cores, CPU, 1 thread; Python {platform.python_version()}, torch {torch.__version__}"
    doc = (__doc__ or "").split("\n\n")
    parts = [
        "# One line, no data\n",
        "What is left of eight trained networks after one call of `prune` without any data, beside the best of\n"
        "Torch-Pruning's four data-free criteria, on whole test sets. Nothing is trained.\n",
        f"    python -m tools.bench_one_line\n\nMeasured on: {about}, Torch-Pruning {_peer_version()}.\n",
        doc[2][doc[2].index('"budget" is') :] + "\n",
        doc[3].strip() + "\n",
        'In brackets: our network as it is cut, before the repair (`recover=None`). "x" is the factor by which\n'
        "multiply-accumulates really fell.\n",
    ]
    table = []
    worse, better = 0, set()
    for name in [m for m in MODELS if any(r["model"] == m for r in rows)]:
        mine = [r for r in rows if r["model"] == name]
        for speedup in sorted({r["speedup"] for r in mine}):
            cells = {r["method"]: r for r in mine if r["speedup"] == speedup}
            peer = cells.get("Torch-Pruning")
            if peer is None:
                continue
            line = [f"{name} ({mine[0]['unit']}, {mine[0]['dense']:.2f})", f"{speedup:g}x"]
            line.append(f"{peer['figure']:.2f} ({peer['best']}, {peer['reached']:.2f}x)")
            for method in OURS.values():
                r = cells.get(method)
                if r is None:
                    line += ["", ""]
                    continue
                line.append(f"{r['figure']:.2f} ({r['cut']:.2f}), {r['reached']:.2f}x")
                figure, best, at = r["against"]
                elsewhere = "" if at == peer["reached"] else f" (against {figure:.2f}, {best}, {at:.2f}x)"
                line.append(f"{r['difference']:+.2f} ± {r['two_errors']:.2f}{elsewhere}")
                worse += r["difference"] < -r["two_errors"]
                if r["difference"] > r["two_errors"]:
                    better.add((name, method))
            table.append(line)
            also = cells.get(HEADS)
            if also is not None:
                told = f"{also['figure']:.2f} ({also['cut']:.2f}), {also['reached']:.2f}x"
                difference = f"{also['difference']:+.2f} ± {also['two_errors']:.2f}"
                table.append(["", "", "", "heads too", "", told, difference])
    heads = ["network (unit, dense)", "asked", "Torch-Pruning, best", "budget", "difference", "ratio", "difference"]
    parts.append(markdown_table(heads, table))
    names = {name for name, _ in better}
    figures, networks = sum(r["method"] in OURS.values() for r in rows), len({r["model"] for r in rows})
    parts.append(
        f"\nOf {figures} figures ('heads too' aside) {worse} are below Torch-Pruning by more than two standard"
        f"\nerrors; at least one is above by more than that on {len(names)} of {networks} networks.\n"
    )
    return "\n".join(parts)


def keep(new: dict[str, Any]) -> None:
    """Add a row, in the place of an earlier one of the same kind."""
    rows: list[dict[str, Any]] = json.loads(TARGET.read_text()) if TARGET.is_file() else []
    key = ("model", "speedup", "method")
    rows = [r for r in rows if [r[k] for k in key] != [new[k] for k in key]] + [new]
    write(Path(TARGET), json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.3, 1.5, 2.0])
    parser.add_argument("--page", action="store_true", help="only write the page from what is there")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in [] if options.page else options.models:
        made, measure = task(name, 64, False), Measure(name)
        dense = round(measure.figure(measure.parts(made.model)), 2)
        for speedup in options.speedups:
            for new in rows_of(name, made, measure, speedup):
                print(new, flush=True)
                keep({**new, "dense": dense})
    write(DOCS / "one-line.md", page(json.loads(TARGET.read_text())))


if __name__ == "__main__":
    main()
