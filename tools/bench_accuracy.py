"""Accuracy after pruning without training and without labels, next to Torch-Pruning.

    python -m tools.bench_accuracy --models resnet56 --speedups 2 3 --images 1500 --select-images 250 --round-to 1
    python -m tools.bench_accuracy --models resnet20 resnet8 dscnn dncnn minilm --speedups 1.3 1.5 2
    python -m tools.bench_accuracy --models llama t5 --speedups 1.3 1.5 2 --weights ../trained

Reads the trained networks and data of GRAPHPRUNE_SHARED_DATA (else ../shared/data beside the checkout) and writes
docs/accuracy.md and docs/accuracy.json. Calibration inputs are training images (ResNets), or what is there otherwise:
the first half of the keywords, whose second half is then the test set; other images with other noise for DnCNN;
sentences of the development split for MiniLM (the test split is measured). The small Llama and T5 are trained here on
the training sentences of SST-2, a few minutes each, and kept in the folder --weights; calibration inputs are some of
the same sentences, and the test sentences are measured (tools/_text_networks.py). Torch-Pruning may only cut the inner
channels of blocks whose shortcuts pad with zeros, and the neurons of MLPs: it fails on the rest.
Rows measured before are kept and replaced one by one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import nn

import graphprune
from tools import _text_networks as text_networks
from tools._common import width_step, widths_line, write

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
METHODS = ["nothing", "mean", "moments", "batchnorm", "least_squares", "blocks"]


def loaders() -> types.ModuleType:
    """The module that loads the shared networks and data."""
    folder = Path(os.environ.get("GRAPHPRUNE_SHARED_DATA") or ROOT.parent / "shared" / "data")
    spec = importlib.util.spec_from_file_location("shared_loaders", folder / "loaders.py")
    if spec is None or spec.loader is None or not (folder / "loaders.py").is_file():
        raise SystemExit(f"no loaders.py in {folder}; set GRAPHPRUNE_SHARED_DATA")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass
class Task:
    """A trained network, calibration batches, and its figure of merit (higher is better)."""

    model: nn.Module
    example: Any
    data: list[Any]
    measure: Callable[[nn.Module], float]
    unit: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    selection: int | None = None  # batches that channels are chosen with; all where None
    new_bias: tuple[bool | None, ...] = (None,)  # as repairs are told, one row each
    held: Callable[[str], bool] = lambda name: False
    """Layers that Torch-Pruning must leave alone: it fails on shortcuts that pad channels with zeros, and on heads."""


def cifar(name: str, images: int, held_out: bool) -> Task:
    shared = loaders()
    raw = name == "resnet8"
    x, y = shared.cifar10("train", limit=max(images, 20000 if held_out else images), raw=raw)
    tx, ty = (x[-2000:], y[-2000:]) if held_out else shared.cifar10("test", raw=raw)
    data = list(x[:images].split(125))
    measure = functools.partial(shared.top1, x=tx, y=ty)
    # only the inner channels of a block are open to Torch-Pruning where shortcuts pad with zeros
    return Task(getattr(shared, name)(), x[:2], data, measure, "top-1 %", held=lambda n: not raw and _outer(n))


def _outer(name: str) -> bool:
    return not name.startswith("layer") or name.endswith("conv2")


def keywords(images: int) -> Task:
    shared = loaders()
    x, y = shared.keywords()
    half = len(x) // 2
    data = list(x[:half].split(125))
    return Task(shared.dscnn(), x[:2], data, lambda net: float(shared.top1(net, x[half:], y[half:])), "top-1 %")


def denoising(images: int) -> Task:
    """Calibration: crops of the CIFAR training images as grey patches with fresh noise, none of the tested images."""
    shared = loaders()
    x, _ = shared.cifar10("train", limit=max(images // 4, 64), raw=True)
    grey = (x.mean(1, keepdim=True) / 255).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(1))
    data = list((grey + noise * 25 / 255).split(16))
    tested = [i[..., :256, :256] for i in shared.set12()]
    return Task(shared.dncnn(), data[0][:1], data, lambda net: float(shared.psnr(net, tested)), "dB")


def sentences(images: int, held_out: bool) -> Task:
    shared = loaders()
    net, tokenizer = shared.minilm()
    pairs = shared.stsb("dev")
    known, tested = (pairs[:1000], pairs[1000:]) if held_out else (pairs, shared.stsb("test"))
    texts = [t for pair in known for t in pair[:2]][:images]
    texts.sort(key=len)
    data = [
        dict(tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(texts), 16)
    ]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # any prefix has all lengths
    example = dict(tokenizer([" ".join(texts[-2:])], truncation=True, max_length=32, return_tensors="pt"))
    options = {"granularity": ["channels", "heads"], "ignore": ["embeddings", "*.output.dense", "pooler"]}

    def measure(model: nn.Module) -> float:
        return float(shared.similarity(model, tokenizer, tested))

    def held(name: str) -> bool:  # all but the neurons of the MLPs
        return "intermediate" not in name

    return Task(net, example, [data[i] for i in order], measure, "Spearman x 100", options, held=held)


def written(name: str, images: int, held_out: bool, weights: Path | None) -> Task:
    """The Llama or the T5 of `tools._text_networks`."""
    shared = loaders()
    texts, tested = ([text for text, _ in shared.sst2(part)] for part in ("train", "dev" if held_out else "test"))
    learnt = text_networks.TASKS[name](texts)
    asked = text_networks.batches(learnt.examples(tested), 32)
    answers = sum(int((wanted != text_networks.PAD).sum()) for _, wanted in asked)
    unit = f"{learnt.said} said right of {answers:,}, % ± {50 / answers**0.5:.2f}"
    data = [inputs for inputs, _ in text_networks.batches(learnt.examples(texts)[:images], 32)]
    model = text_networks.trained(learnt, learnt.examples(texts), weights)

    def held(layer: str) -> bool:  # all but the neurons of the MLPs
        return not any(part in layer for part in ("gate_proj", "up_proj", "wi_"))

    measure = functools.partial(text_networks.right, data=asked)
    return Task(model, data[0], data, measure, unit, new_bias=(None, True), held=held)


def task(name: str, images: int, held_out: bool, weights: Path | None = None) -> Task:
    if name in text_networks.TASKS:
        return written(name, images, held_out, weights)
    if name == "dscnn":
        return keywords(images)
    if name == "dncnn":
        return denoising(images)
    if name == "minilm":
        return sentences(images, held_out)
    return cifar(name, images, held_out)


def torch_pruning_result(made: Task, ratio: float, importance: Any) -> nn.Module:
    """Torch-Pruning at this uniform ratio."""
    model = copy.deepcopy(made.model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    held = [m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and made.held(n)]
    kept = [*linear[-1:], *held]
    torch_pruning.pruner.BasePruner(
        model, made.example, importance=importance, pruning_ratio=ratio, ignored_layers=kept, global_pruning=False
    ).step()
    return model


def torch_pruning_ratio(made: Task, speedup: float) -> float:
    """The least uniform ratio that reaches the speed-up, by bisection; widths are the same for every criterion."""
    dense = graphprune.count(made.model, made.example).macs
    low, high = 0.0, 0.95
    for step in range(11):
        ratio = (low + high) / 2 if step else high
        small = torch_pruning_result(made, ratio, _importances()["L2"])
        reached = graphprune.count(small, made.example).macs <= dense / speedup
        if not step and not reached:
            raise RuntimeError("the speed-up was not reached")
        low, high = (low, ratio) if reached else (ratio, high)
    return high


def _importances() -> dict[str, Any]:
    library = torch_pruning.importance
    return {
        "L2": library.GroupMagnitudeImportance(p=2),
        "L1": library.GroupMagnitudeImportance(p=1),
        "BN scale": library.BNScaleImportance(),
        "LAMP": library.LAMPImportance(),
    }


def measure_model(
    name: str, made: Task, speedup: float, only: str | None, methods: list[str], round_to: int | str
) -> list[dict[str, Any]]:
    """All rows of one model and speed-up."""
    rows = []
    budget = graphprune.Budget(macs=1 / speedup)
    dense = graphprune.count(made.model, made.example).macs

    def row(method: str, model: nn.Module, seconds: float) -> None:
        reached = dense / graphprune.count(model, made.example).macs
        rows.append(
            {
                "model": name, "unit": made.unit, "speedup": speedup, "method": method, "reached": round(reached, 3),
                "value": round(made.measure(model), 2), "seconds": round(seconds),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)

    if only != "ours":
        ratio = torch_pruning_ratio(made, speedup)
        for label, importance in _importances().items():
            try:
                small = torch_pruning_result(made, ratio, importance)
                if dense / graphprune.count(small, made.example).macs < 0.95 * speedup:
                    print(f"Torch-Pruning {label} on {name}: it finds nothing to go by and leaves the network as it is")
                    continue
                row(f"Torch-Pruning, {label}", small, 0)
            except Exception as error:
                print(f"Torch-Pruning {label} on {name}: {type(error).__name__}: {error}", flush=True)
    if only == "peers":
        return rows
    start = time.perf_counter()
    widths: dict[str, Any] = {"budget": budget, "round_to": round_to, **made.options}
    plan = graphprune.plan(made.model, made.example, criterion="l2_folded", **widths)
    if "nothing" in methods:
        row("L2 of folded filters", plan.apply(made.model), time.perf_counter() - start)
    start = time.perf_counter()
    chosen = made.data[: made.selection]
    plan = graphprune.plan(made.model, made.example, criterion="reconstruction", data=chosen, **widths)
    planned = time.perf_counter() - start
    if "nothing" in methods:
        row("reconstruction", plan.apply(made.model), planned)
    for method, new_bias in itertools.product((m for m in methods if m != "nothing"), made.new_bias):
        start = time.perf_counter()
        try:
            found = graphprune.recover(made.model, plan, made.example, made.data, method, new_bias=new_bias)
        except graphprune.GraphPruneError as error:
            print(f"{name}: {error}")
            continue
        print(found)
        label = f"reconstruction + {method}" + (" with new biases" if new_bias else "")
        row(label, found.model, planned + time.perf_counter() - start)
    return rows


def _inputs(rows: list[dict[str, Any]]) -> str:
    """Calibration inputs and widths of one model's rows, by speed-up where they differ."""
    used = {
        r["speedup"]: f"{r['images']} calibration inputs, {r['selection']} for the choice, widths "
        f"{widths_line(r['round_to'])}"
        for r in rows
    }
    if len(set(used.values())) == 1:
        return used[rows[0]["speedup"]]
    return "; ".join(f"{speedup:g}x: {used[speedup]}" for speedup in sorted(used))


def table(rows: list[dict[str, Any]]) -> str:
    """One table per model: methods down, speed-ups across."""
    parts = []
    for name in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == name]
        speeds = sorted({r["speedup"] for r in mine})
        unit, dense = mine[0]["unit"], mine[0]["dense"]
        inputs = _inputs([r for r in mine if r["method"].startswith("reconstruction")] or mine)
        parts.append(f"\n## {name} ({unit}, dense {dense:.2f}; {inputs})\n")
        parts.append("| method | " + " | ".join(f"{s:g}x" for s in speeds) + " | seconds |")
        parts.append("| --- |" + " ---: |" * (len(speeds) + 1))
        for method in dict.fromkeys(r["method"] for r in mine):
            cells = {r["speedup"]: r for r in mine if r["method"] == method}
            values = [f"{cells[s]['value']:.2f}" if s in cells else "" for s in speeds]
            seconds = max(r["seconds"] for r in cells.values())
            parts.append(f"| {method} | " + " | ".join(values) + f" | {seconds or ''} |")
    return "\n".join(parts)


HEADER = """# Accuracy without training

Pruned to a budget of multiply-accumulates, no labels, no training; whole test sets. "reconstruction" is the selection
alone, "+ mean", "+ moments" (without data), "+ batchnorm", "+ least_squares" and "+ blocks" what recovery makes of the
same plan.
Torch-Pruning at the uniform ratio that reaches the same budget, each of its criteria that needs no data. Seconds:
planning and recovery together, the longest of the row, on a machine shared with other work. Tables "on held-out
training data" confirm the settings on images that calibration does not use; the dense ResNets have seen them in their
training. Widths "that run well" are those of the default, `round_to="auto"`; "any", of `round_to=1`, are most accurate
for their multiply-accumulates.

The Llama and the T5 are small networks of transformers that the tool trains on the training sentences of SST-2, for
three minutes each: the one says the next character, the other puts words in order. Calibration inputs are some of those
sentences, the test sentences are measured; ± is one standard error at the most. Networks built from a configuration
are given no biases that it has no place for, so there "+ mean" does nothing; "with new biases" is `new_bias=True`.

Written by `python -m tools.bench_accuracy` ({machine}; {versions}). Calibration inputs: see the tool.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet56"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0])
    parser.add_argument("--images", type=int, default=2000, help="calibration inputs")
    parser.add_argument("--select-images", type=int, help="how many of them choose the channels; default all")
    parser.add_argument("--held-out", action="store_true", help="measure on held-out training images, write nothing")
    parser.add_argument("--record", action="store_true", help="write held-out figures too, as a table of their own")
    parser.add_argument("--only", choices=["ours", "peers"], help="measure one side alone")
    parser.add_argument("--weights", type=Path, help="a folder for trained networks; default: they are trained anew")
    parser.add_argument("--round-to", type=width_step, default="auto", help="as in graphprune.plan")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    target = DOCS / "accuracy.json"
    for name in options.models:
        made = task(name, options.images, options.held_out, options.weights)
        images = sum(len(d["input_ids"]) if isinstance(d, dict) else len(d) for d in made.data)
        if options.select_images:
            made.selection = max(1, round(len(made.data) * options.select_images / images))
        dense: float | None = None
        label = f"{name} on held-out training data" if options.held_out else name
        for speedup in options.speedups:
            new = measure_model(label, made, speedup, options.only, options.methods, options.round_to)
            if options.held_out and not options.record:
                continue
            dense = dense or round(made.measure(made.model), 2)
            for r in new:
                selection = min(options.select_images or images, images)
                r.update(dense=dense, images=images, selection=selection, round_to=options.round_to)
            rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.is_file() else []
            keys = {(r["model"], r["speedup"], r["method"]) for r in new}
            rows = [r for r in rows if (r["model"], r["speedup"], r["method"]) not in keys] + new
            write(target, json.dumps(rows, indent=1))
            machine = f"{os.cpu_count()} cores, CPU, {torch.get_num_threads()} thread"
            versions = f"Python {platform.python_version()}, torch {torch.__version__}, Torch-Pruning {_peer_version()}"
            write(DOCS / "accuracy.md", HEADER.format(machine=machine, versions=versions) + table(rows) + "\n")


def _peer_version() -> str:
    return version("torch-pruning")


if __name__ == "__main__":
    main()
