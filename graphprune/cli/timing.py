"""The command latency-table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runtimes import latency_table
from ..runtimes.latency import Target
from ..support.files import check_target
from .factories import load_factory
from .terminal import JsonOption, ModelArgument, QuietOption, SeedOption, ShapeOption, WeightsOption, show, working


def write_table(
    model: ModelArgument,
    path: Annotated[Path, typer.Argument(metavar="FILE.json", help="The file to write.", show_default=False)],
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    provider: Annotated[str, typer.Option(help="auto, cpu, cuda or a full name.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads inside a node.", min=1)] = 1,
    runtime: Annotated[str, typer.Option(help="As the command runtimes lists them.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or int8.")] = "fp32",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what planning with a latency budget looks up, for use on another machine (prune --latency-table)."""
    with working("latency-table", quiet) as work:
        work.step("building the model")
        check_target(path)
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        work.step("measuring")
        made = latency_table(loaded.model, example, Target(provider, threads, runtime=runtime, precision=precision))
        made.save(path)
    dense = next(iter(made.contexts.values())).wall
    steps = {kind: list(stairs.steps) for kind, stairs in made.stairs.items()}
    points = sum(len(found) for found in made.points.values())
    data = {"model": model, "file": str(path), "dense_ms": 1e3 * dense, "points": points, "about": dict(made.about)}
    lines = [f"{kind}: widths worth having, modulo 64: {', '.join(map(str, s))}" for kind, s in steps.items()]
    text = f"{points} times, dense network {1e3 * dense:.3g} ms on {made.about['provider']}"
    show(as_json, {**data, "stairs": steps}, text, *lines, f"written: {path}")
