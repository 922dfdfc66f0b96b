"""Layers and branches left out one by one: exactness, accuracy, latency after each; and layers together with channels.

    python -m tools.bench_layers                       # everything, then docs/layers.md
    python -m tools.bench_layers --models vit llama    # some of it
    python -m tools.bench_layers --latency             # only measure the files of an earlier run again

Rows are stored as they are made; a run goes on where the last one stopped, and --again forgets what it made.

Networks: CIFAR-10 ResNet-56 of the shared data folder (GRAPHPRUNE_SHARED_DATA, else ../shared/data beside the
checkout), a vision transformer on scikit-learn's digits, and a byte-level decoder built as Llama is, on the source of
two of Python's modules; the last two are trained here. At each step the layer (or branch) without which the loss on
training data is lowest goes (criterion "loss"), from the network that the step before left. No training afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.dependency.whole.blocks import Block, find_blocks
from graphprune.dependency.whole.branches import find_branches
from graphprune.plans.surgery import remove_layers
from tools._common import machine_line, markdown_table, versions_line, write
from tools._layer_networks import TASKS, Task

OUTPUT = Path("docs/layers.md")
FILES = Path("build/layers")
HALF = 0.5
COMBINED = {"resnet56": (0, 2, 4, 1), "vit": (0, 1, 2), "llama": (0, 1, 2)}
BRANCHES, FIRST_BRANCH = {"vit": 6, "llama": 6}, 200  # how many go, and the number of their row 0


class Store:
    """Rows, written to a file one by one. Those whose network is still in `FILES` are not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def find(self, name: str, step: int) -> dict[str, Any] | None:
        """The row of a step, if it is there and its network too."""
        row = self.stored(name, step)
        return row if row is not None and (FILES / row["file"]).is_file() else None

    def stored(self, name: str, step: int) -> dict[str, Any] | None:
        """The row of a step, if it is there."""
        return next((r for r in self.rows if (r["model"], r["step"]) == (name, step)), None)

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row in its place, or replace the one that was there."""
        key = (row["model"], row["step"])
        self.rows = [r for r in self.rows if (r["model"], r["step"]) != key] + [row]
        self.write()

    def write(self) -> None:
        order = list(TASKS)
        self.rows.sort(key=lambda row: (order.index(row["model"]), row["step"]))
        write(self.path, json.dumps(self.rows, indent=1) + "\n")


def one_by_one(name: str, task: Task, store: Store) -> list[nn.Module]:
    """A row for the dense network and one for every layer less. Returns these networks."""
    networks = [task.model]
    for step in range(task.steps + 1):
        known = store.stored(name, step) if task.given else store.find(name, step)
        if known is None:
            if step:
                layer, small, error = _one_less(networks[-1], task, "layer", find_blocks)
                networks.append(small)
                store.keep(_row(name, task, step, layer, small, error))
            else:
                store.keep(_row(name, task, 0, "", task.model, 0.0))
        elif step:
            blocks = [b for b in find_blocks(networks[-1], task.example) if b.module == known["layer"]]
            networks.append(remove_layers(networks[-1], blocks))
        if not (FILES / f"{name}-{step}.onnx").is_file():
            _export(networks[-1], task, f"{name}-{step}.onnx")
    return networks


def branches(name: str, task: Task, store: Store) -> None:
    """A row for every branch less."""
    model = task.model
    for step in range(1, BRANCHES.get(name, 0) + 1):
        known = store.find(name, FIRST_BRANCH + step)
        if known is None:
            branch, model, error = _one_less(model, task, "branch", find_branches)
            row = _row(name, task, FIRST_BRANCH + step, branch, model, error)
            store.keep({**row, "branches": step})
        else:
            gone = [b for b in find_branches(model, task.example) if b.module == known["layer"]]
            model = remove_layers(model, gone)


def _one_less(
    model: nn.Module, task: Task, granularity: str, find: Callable[[nn.Module, Any], Sequence[Block]]
) -> tuple[str, nn.Module, float]:
    """What went, the network without it, and its largest relative difference to the bypassed one."""
    share = 1 / len(find(model, task.example))
    plan = graphprune.plan(
        model, task.example, share, granularity=granularity, criterion="loss", data=task.data, loss_fn=task.loss_fn
    )
    small = plan.apply(model)
    report = graphprune.verify(model, small, plan, task.example)
    report.raise_on_failure()
    return plan.layers[0].module, small, max(c.error for c in report.checks if c.name.startswith("bypass"))


def _row(name: str, task: Task, step: int, layer: str, model: nn.Module, error: float) -> dict[str, Any]:
    file = f"{name}-{step}.onnx"
    _export(model, task, file)
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    row = {
        "model": name,
        "step": step,
        "layer": layer,
        "error": error,
        "merit": task.measure(model),
        "recovered": task.measure(_reestimated(model, task)) if normed and 0 < step < 100 else None,
        "macs": graphprune.count(model, task.example).macs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "unit": task.unit,
        "file": file,
    }
    print({k: v for k, v in row.items() if k not in ("unit", "file")}, flush=True)
    return row


def _export(model: nn.Module, task: Task, file: str) -> None:
    FILES.mkdir(parents=True, exist_ok=True)
    graphprune.export_onnx(copy.deepcopy(model), task.example, FILES / file)


def _reestimated(model: nn.Module, task: Task) -> nn.Module:
    """Batch norm statistics measured again, as a plan that removes nothing."""
    empty = graphprune.plan(model, task.example, 0.0, granularity="layer")
    return graphprune.recover(model, empty, task.example, [x for x, _ in task.data], "batchnorm").model


def together(name: str, task: Task, networks: Sequence[nn.Module], store: Store) -> None:
    """Rows of networks without some layers, then channels down to half of the dense network's MACs."""
    budget = graphprune.Budget(macs=HALF * graphprune.count(task.model, task.example).macs)
    options: dict[str, Any] = {"budget": budget, "data": [x for x, _ in task.data], "recover": "least_squares"}
    options["criterion"] = "reconstruction" if name == "resnet56" else "wanda"
    for number in COMBINED[name]:
        if store.find(name, 100 + number) is None:
            small = graphprune.prune(networks[number], task.example, **options)
            row = _row(name, task, 100 + number, f"{number} layers", small, 0.0)
            store.keep({**row, "combined": number})


def measure_latency(rows: list[dict[str, Any]], tasks: dict[str, Task]) -> None:
    """Fill in milliseconds and speed-ups: the files of one network alternated in one call."""
    for name, task in tasks.items():
        mine = [row for row in rows if row["model"] == name]
        files = {row["file"]: FILES / row["file"] for row in mine}
        base = f"{name}-0.onnx"
        report = graphprune.benchmark(files, task.example, threads=1, rounds=15, baseline=base, provider="cpu")
        for row in mine:
            found = report.row(row["file"])
            row["ms"], row["speedup"] = found.median_ms, found.speedup


def page(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    parts = [
        "# Layers left out",
        "",
        *(__doc__ or "").strip().splitlines()[-4:],
        "",
        "    python -m tools.bench_layers",
        "",
        f"{machine_line(1)}. {versions_line('torch', 'onnx', 'onnxruntime-gpu')}",
        "",
        "*Exact*: largest relative difference to the network before the step with that layer bypassed by a hook, on "
        "the example input and on noise. Latency: ONNX Runtime on the CPU, one thread, batch 1, median, all files of "
        "a network alternated.",
        "",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        parts += [f"## {name}", "", _steps([r for r in mine if not {"combined", "branches"} & r.keys()]), ""]
        fewer = [r for r in mine if "branches" in r]
        if fewer:
            parts += ["Branches left out one by one: attention or the MLP of a layer alone.", ""]
            parts += [_steps([mine[0], *fewer], "branches"), ""]
        both = [r for r in mine if "combined" in r]
        if both:
            parts += [
                f"Layers and channels together, at {1 / HALF:g}x fewer multiply-accumulates: channels by "
                f"{'reconstruction error' if name == 'resnet56' else 'activation x weight'} and least-squares "
                f"recovery; no training.",
                "",
                _combined(both, mine[0]),
                "",
            ]
    return "\n".join(parts)


def _merit(row: dict[str, Any], key: str = "merit") -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.2f}" if "%" in row["unit"] else f"{value:.3f}"


def _steps(rows: list[dict[str, Any]], what: str = "layers") -> str:
    normed = any(row["recovered"] is not None for row in rows)
    headings = [f"{what} less", "the one that went", "exact", rows[0]["unit"]]
    headings += ["batch norms measured again"] if normed else []
    headings += ["MACs", "parameters", "ms", "speed-up"]
    cells = []
    for row in rows:
        cell = [str(row.get("branches", row["step"])), row["layer"]]
        cell += [f"{row['error']:.0e}" if row["step"] else "", _merit(row)]
        cell += [_merit(row, "recovered")] if normed else []
        cell += [f"{row['macs'] / rows[0]['macs']:.0%}", f"{row['parameters'] / rows[0]['parameters']:.0%}"]
        cell += [f"{row['ms']:.2f}", f"{row['speedup']:.2f}"] if "ms" in row else ["", ""]
        cells.append(cell)
    return markdown_table(headings, cells)


def _combined(rows: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    headings = ["layers less", rows[0]["unit"], "MACs", "ms", "speed-up"]
    cells = [
        [
            str(row["combined"]),
            _merit(row),
            f"{row['macs'] / dense['macs']:.0%}",
            *([f"{row['ms']:.2f}", f"{row['speedup']:.2f}"] if "ms" in row else ["", ""]),
        ]
        for row in rows
    ]
    return markdown_table(headings, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_layers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--latency", action="store_true", help="prune nothing, only measure the files again")
    parser.add_argument("--rows", action="store_true", help="measure no latency")
    parser.add_argument("--again", action="store_true", help="make rows again that are there already")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"Markdown page (default {OUTPUT})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    store = Store(options.output.with_suffix(".json"))
    tasks = {name: TASKS[name]() for name in options.models}
    if options.again:
        store.rows = [row for row in store.rows if row["model"] not in tasks]
    if not options.latency:
        for name, task in tasks.items():
            together(name, task, one_by_one(name, task, store), store)
            branches(name, task, store)
    if not options.rows:
        measure_latency(store.rows, tasks)
        store.write()
    write(options.output, page(store.rows))
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
