"""The command pipeline: train, prune, fine-tune, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import GraphPruneError
from ..planning.allocation import Budget
from ..plans.storage import save
from ..support.files import check_target
from ..workflows.pipelines import PipelineResult, pipeline
from .factories import load_data, load_factory
from .terminal import (
    AllowOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    SeedOption,
    ShapeOption,
    WeightsOption,
    parse_options,
    show,
    working,
)

_TRAINING = "Training"
_PRUNING = "How to prune"


def run_pipeline(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="Function without arguments that returns training batches (inputs, targets), or a pair of those and "
            "held-out batches to evaluate on.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="NAME", help="Writes NAME.safetensors, NAME.report.json and plans."),
    ] = Path("pruned"),
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction to remove; 0.5 if not told.", rich_help_panel=_PRUNING)
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(help="Instead: fraction of the MACs that may stay (channels, at once).", rich_help_panel=_PRUNING),
    ] = None,
    method: Annotated[
        str, typer.Option(help="channels, layers, magnitude or gradient.", rich_help_panel=_PRUNING)
    ] = "channels",
    schedule: Annotated[
        str,
        typer.Option(
            help="one-shot, or gradually: linear, cubic, exponential, sinusoidal, zhu-gupta.", rich_help_panel=_PRUNING
        ),
    ] = "one-shot",
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Of the method, such as criterion=taylor. Repeatable.", rich_help_panel=_PRUNING
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(help="mean, batchnorm, least_squares or blocks, before training.", rich_help_panel=_PRUNING),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Batches for criteria and --recover instead of the training data; synthetic: made from the model.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    train_epochs: Annotated[int, typer.Option(help="Before pruning.", rich_help_panel=_TRAINING)] = 0,
    prune_epochs: Annotated[
        int | None, typer.Option(help="Of gradual pruning; 5 if not told.", rich_help_panel=_TRAINING)
    ] = None,
    finetune_epochs: Annotated[int, typer.Option(help="After pruning.", rich_help_panel=_TRAINING)] = 3,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.", rich_help_panel=_TRAINING)] = "sgd",
    train_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate before pruning.", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate after it.", rich_help_panel=_TRAINING)] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Learn from the dense network too.", rich_help_panel=_TRAINING)
    ] = False,
    regularize: Annotated[
        str | None,
        typer.Option(
            help="lasso or growing: drive weak channels to zero before pruning (needs --train-epochs).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better score before stopping.", rich_help_panel=_TRAINING)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Go on from here, if it was stopped.", rich_help_panel=_TRAINING),
    ] = None,
    allow_nothing: AllowOption = False,
    speed: Annotated[bool, typer.Option("--speed", help="Measure the latency before and after.")] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Write the report as .html, .md, .csv or .txt too. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model, prune it at once or gradually, fine-tune it, write the weights and a report."""
    options = parse_options(option)
    with working("pipeline", quiet) as work:
        work.step("building the model")
        for path in report or ():
            check_target(path)
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        batches, held_out = load_data(data, seed=seed)
        calibrating = None if calibration is None else load_data(calibration, seed=seed)[0]
        work.step("training and pruning")
        done = pipeline(
            loaded.model,
            example,
            batches,
            sparsity,
            method=method,
            schedule=schedule,
            budget=None if macs is None else Budget(macs=macs),
            options=options,
            train_epochs=train_epochs,
            prune_epochs=prune_epochs,
            finetune_epochs=finetune_epochs,
            train_lr=train_lr,
            optimizer=optimizer,
            lr=lr,
            distillation=distil,
            regularize=regularize,
            recover=recover,
            calibration=calibrating,
            evaluate=held_out,
            patience=patience,
            speed=speed,
            seed=seed,
            checkpoint=checkpoint,
            strict=not allow_nothing,
        )
        files = _written(done, output, report or [])
    data_out = {"model": model, **done.to_dict(), "files": files}
    show(as_json, data_out, done.tuning.table(), str(done.report), f"written: {', '.join(files)}")


def _written(done: PipelineResult, output: Path, reports: list[Path]) -> list[str]:
    if not output.name:
        raise GraphPruneError(f"{str(output)!r} is no name for files")
    files = [f"{output}.safetensors", f"{output}.report.json"]
    save(done.model, files[0])
    done.report.save(files[1])
    for number, plan in enumerate(done.plans, 1):
        files.append(f"{output}.plan.json" if len(done.plans) == 1 else f"{output}.{number}.plan.json")
        plan.save(files[-1])
    return files + [str(done.report.save(path)) for path in reports]
