"""The commands that change nothing: inspect, doctor and advise."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..dependency import DependencyGraph, trace
from ..support.tables import Column, table
from ..tracing.counting import count
from ..workflows.diagnosis import advise as recommend
from ..workflows.diagnosis import doctor as look
from .factories import load_data, load_factory
from .terminal import (
    DrawOption,
    ExplainOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    ShapeOption,
    WeightsOption,
    show,
    working,
)


def inspect(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    explain: ExplainOption = None,
    draw: DrawOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what can be pruned, what cannot and why, parameters and MACs. Changes nothing."""
    with working("inspect", quiet) as work:
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        work.step("tracing")
        graph = trace(loaded.model, example)
        explained = {name: graph.explain(name) for name in explain or ()}
        work.step("counting")
        counted = count(loaded.model, example)
        work.step("drawing and reporting")
        files = [graph.draw(path) for path in draw or ()]
        frozen = graph.frozen
    kernels = sum(all(r.kind in ("kernel", "numbers") for r in f.reasons) and bool(f.reasons) for f in frozen)
    news = [str(f) for f in frozen if not f.reasons or any(r.kind not in ("kernel", "numbers") for r in f.reasons)]
    data = {
        "model": model,
        "class": type(loaded.model).__name__,
        **counted.to_dict(),
        "groups": [_group(graph, index) for index in range(len(graph.groups))],
        "frozen": [
            {
                "parameter": f.parameter,
                "axis": f.axis,
                "count": f.count,
                "length": f.length,
                "reasons": [str(r) for r in f.reasons],
            }
            for f in frozen
        ],
        "explained": explained,
        "files": [str(path) for path in files],
    }
    groups = table(
        graph.groups,
        [
            Column("group", "index"),
            Column("named by", "name", justify="left"),
            Column("units", "size"),
            Column("kind", "kind", justify="left"),
            Column("parameter axes", lambda group: len(group.members)),
        ],
        title="Groups: what can be removed together",
    )
    text = [f"{model}: {type(loaded.model).__name__}", str(counted), groups]
    text += ["Cannot be removed:", *(f"  {line}" for line in news)] if news else []
    text += [f"  and {kernels} axes of kernel positions, which are no channels"] if kernels else []
    show(as_json, data, *text, *explained.values(), *(f"drawn: {path}" for path in files))


def _group(graph: DependencyGraph, index: int) -> dict[str, Any]:
    group = graph.groups[index]
    members = [
        {"parameter": m.parameter, "axis": m.axis, "role": m.role, "per_unit": int(m.positions.shape[1])}
        for m in group.members
    ]
    return {"index": index, "name": group.name, "kind": group.kind, "size": group.size, "members": members}


def doctor(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    ratio: Annotated[float, typer.Option(help="Fraction of all channels for which blockers are looked for.")] = 0.5,
    sort: Annotated[str, typer.Option(help="What makes a blocker dear: parameters or macs.")] = "parameters",
    limit: Annotated[int, typer.Option(help="Lines of each table; 0 for all.", min=0)] = 20,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what can be pruned, what blocks the rest, at which line, and what that costs. Changes nothing."""
    with working("doctor", quiet) as work:
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        work.step("looking")
        found = look(loaded.model, loaded.input(input_shape or (), seed), ratio=ratio, sort=sort)
    show(as_json, {**found.to_dict(), "model": model, "class": found.model}, found.text(limit or None))


def advise(
    model: ModelArgument,
    goal: Annotated[str, typer.Option(help="speed, size (of the file) or resources (both small).")] = "speed",
    finetune: Annotated[bool, typer.Option("--finetune", help="The model can be trained after pruning.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Function that returns batches to calibrate on, or a pair of those and held-out (inputs, targets).",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How much of the score may be lost.")] = 0.01,
    speed: Annotated[bool, typer.Option("--speed", help="Measure latencies here.")] = False,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Recommend a method for a model and a goal, with numbers from the model itself. Changes nothing."""
    with working("advise", quiet) as work:
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        batches, held_out = (None, None) if data is None else load_data(data, seed=seed)
        work.step("trying methods")
        found = recommend(
            loaded.model,
            loaded.input(input_shape or (), seed),
            goal,
            finetune=finetune,
            data=batches,
            evaluate=held_out,
            tolerance=tolerance,
            speed=speed,
        )
    show(as_json, {**found.to_dict(), "model": model, "class": found.model}, str(found))
