"""The command `graphprune doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..factories import load_factory
from ..terminal import JsonOption, ModelArgument, SeedOption, ShapeOption, WeightsOption, show, working
from .doctor import doctor


def doctor_command(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    ratio: Annotated[float, typer.Option(help="Fraction of all channels for which blockers are looked for.")] = 0.5,
    sort: Annotated[str, typer.Option(help="What makes a blocker dear: parameters or macs.")] = "parameters",
    limit: Annotated[int, typer.Option(help="Lines of each table; 0 for all.", min=0)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Say what can be pruned, what blocks the rest, at which line, and what that costs. Changes nothing."""
    with working(2) as work:
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        work.step("looking")
        found = doctor(loaded.model, loaded.input(input_shape or (), seed), ratio=ratio, sort=sort)
    show(as_json, {**found.to_dict(), "model": model, "class": found.model}, found.text(limit or None))
