"""What pruning gains in every runtime and precision, against the dense network in the same one.

    python -m tools.bench_runtimes                                                  # all that is usable here
    python -m tools.bench_runtimes --networks resnet50 --runtimes onnxruntime openvino --precisions fp32 int8
    python -m tools.bench_runtimes --python executorch=build/runtimes/executorch/bin/python --runtimes executorch

Each network in a process of its own: dense, by `graphprune.prune(model, x, 0.3)` and `(model, x, 0.5)`, and the widths
that Torch-Pruning gives at the same ratios. Weights are random (latency does not depend on them), the statistics of
batch norms are not trivial. One thread, batch 1; times and their intervals as `graphprune.benchmark` measures them.
int8 is calibrated on noise: its accuracy is another table's affair. Rows are kept as soon as a runtime is done, and
replaced network by network and runtime by runtime, in docs/runtimes.json and docs/runtimes.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from tools._common import build, enliven, example_for, machine_line, markdown_table, versions_line, write
from tools._peer import first_line, prune_in_place

DOCS = Path("docs")
RATIOS = (0.3, 0.5)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
# The upper end of the interval of (time / dense time) that no pruned network may pass.
LIMIT = 1.03


def _vit_s() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return model.eval()


def _yolov8n() -> nn.Module:
    from ultralytics import YOLO

    torch.manual_seed(0)
    model: nn.Module = YOLO("yolov8n.yaml").model.eval()
    return model


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": _torchvision("resnet50"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "vit_s": _vit_s,
    "yolov8n": _yolov8n,
}
SIZES = {"yolov8n": 640}
# What makes the output, which Torch-Pruning must be told to leave; of torchvision's others it is the classifier.
OUTPUTS = {"vit_s": ["heads.head"], "yolov8n": ["model.22"]}


def example_of(name: str) -> Tensor:
    """One random image of the size that the network is made for."""
    size = SIZES.get(name, 224)
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def models_of(name: str, example: Tensor) -> tuple[dict[str, nn.Module], list[str]]:
    """Dense, ours at both ratios, and the peer's where it can prune the network; and why it cannot."""
    dense = NETWORKS[name]()
    if name not in SIZES:
        enliven(dense, example_for(name, 4, seed=1))
    models = {"dense": dense}
    for ratio in RATIOS:
        models[f"graphprune {ratio:g}"] = graphprune.prune(dense, example, ratio)
    failed: list[str] = []
    for ratio in RATIOS:
        try:
            other = copy.deepcopy(dense)
            with torch.enable_grad():
                prune_in_place(other, example, ratio, OUTPUTS.get(name))
            other(example)
            models[f"Torch-Pruning {ratio:g}"] = other.eval()
        except Exception as error:
            failed.append(f"ratio {ratio:g}: {first_line(error)}")
    return models, failed


def measure(name: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of one network, runtime after runtime."""
    example = example_of(name)
    models, failed = models_of(name, example)
    pythons = dict(item.split("=", 1) for item in options.python)
    names = options.runtimes or [*graphprune.runtimes.usable_runtimes().usable, *pythons]
    yield [{"network": name, "runtime": "Torch-Pruning", "failed": said} for said in failed]
    for runtime in dict.fromkeys(names):
        rows: list[dict[str, Any]] = []
        data = [torch.randn_like(example) for _ in range(8)] if "int8" in options.precisions else None
        try:
            report = graphprune.benchmark(
                models, example, runtimes={runtime: pythons.get(runtime)}, precisions=options.precisions,
                provider="cpu", rounds=options.rounds, data=data,
            )  # fmt: skip
        except graphprune.GraphPruneError as error:
            yield [{"network": name, "runtime": runtime, "failed": str(error)}]
            continue
        for row in report.rows:
            rows.append(
                {
                    "network": name, "runtime": runtime, "precision": row.precision, "model": row.model,
                    "ms": row.median_ms, "relative": 1 / row.speedup, "low": 1 / row.speedup_high,
                    "high": 1 / row.speedup_low, "error": row.max_relative_error, "mib": row.file_mib,
                    "in_force": row.in_force, "clock": row.clock,
                    "version": {k: v for k, v in report.versions.items() if k not in ("python", "graphprune")},
                }
            )  # fmt: skip
        rows.extend(
            {"network": name, "runtime": runtime, "note": note} for note in report.notes if "left out" in note
        )
        yield rows


def page(rows: list[dict[str, Any]]) -> str:
    """The page: a table, what is slower than dense, and what could not be measured."""
    timed = [row for row in rows if "ms" in row]
    headings = ["network", "runtime", "precision", "model", "ms", "of dense (95 %)", "largest error", "MiB", "in force"]
    cells = [
        [
            r["network"], r["runtime"], r["precision"], r["model"], f"{r['ms']:.2f}",
            "1" if r["model"] == "dense" else f"{r['relative']:.2f} ({r['low']:.2f} - {r['high']:.2f})",
            "" if r["error"] is None else f"{r['error']:.1e}", f"{r['mib']:.1f}", r["in_force"],
        ]
        for r in timed
    ]  # fmt: skip
    ours = [r for r in timed if r["model"].startswith("graphprune")]
    slower = [f"{r['network']}, {r['model']}, {r['runtime']} {r['precision']}" for r in ours if r["high"] > LIMIT]
    said = f"Of {len(ours)} pruned networks, {len(slower)} may take more than {LIMIT:g} of the dense one's time"
    text = [
        "# Every runtime and precision",
        "",
        "Time for one image on one thread, relative to the dense network in the same runtime and precision; errors "
        "against PyTorch in float32, in int8 of networks with random weights, calibrated on noise.",
        "",
        f"Written by `python -m tools.bench_runtimes` ({machine_line(1)}; {versions_line('torch')}; "
        f"{_versions(timed)}).",
        "",
        f"{said}{': ' + '; '.join(slower) if slower else ''}.",
        "",
        markdown_table(headings, cells),
    ]
    missing = [f"- {r['network']}, {r['runtime']}: {r.get('failed') or r['note']}" for r in rows if "ms" not in r]
    if missing:
        text += ["", "## Not measured", "", *missing]
    return "\n".join(text) + "\n"


def _versions(timed: list[dict[str, Any]]) -> str:
    """Of the runtimes, and of what quantised for them."""
    found = {f"{name} {version}" for row in timed for name, version in row["version"].items() if name != "torch"}
    return ", ".join(sorted(found))


def keep(new: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same network and runtime, and write the page."""
    if not new:
        return
    target = DOCS / "runtimes.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text()) if target.is_file() else []
    fresh = {(row["network"], row["runtime"]) for row in new}
    rows = [row for row in rows if (row["network"], row["runtime"]) not in fresh] + new
    rows.sort(key=lambda r: (list(NETWORKS).index(r["network"]), r["runtime"]))
    write(target, json.dumps(rows, indent=1))
    write(DOCS / "runtimes.md", page(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", help="default: those that are usable here")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--python", nargs="+", default=[], metavar="RUNTIME=PYTHON", help="interpreters to run with")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if len(options.networks) == 1:
        for rows in measure(options.networks[0], options):
            keep(rows)
        return
    more = [argument for argument in sys.argv[1:] if argument not in (*options.networks, "--networks")]
    for name in options.networks:
        command = [sys.executable, "-m", "tools.bench_runtimes", "--networks", name, *more]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
