"""The command line: `graphprune inspect | prune | export | bench`.

Models are named `module:function`; see `graphprune.factories.load_factory`. Results go to standard output, everything
else (progress, warnings, errors, what a model prints) to standard error.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ._version import __version__
from .counting import Count, count
from .dependency import DependencyGraph, trace
from .deploy import ExportReport, benchmark, export_onnx
from .engine import plan as make_plan
from .errors import GraphPruneError
from .factories import InputShape, Loaded, load_factory, load_weights, save_weights
from .plans import Plan
from .report.tables import Column, render, table
from .verification import VerificationReport, verify

app = typer.Typer(
    name="graphprune",
    help="Structured pruning of PyTorch models: look at one, prune it, export it to ONNX, measure it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PLAN = "How to prune"
_MODEL = "Model"
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="Function without arguments that returns a model, or (model, example input). The current directory is "
        "searched first.",
        show_default=False,
    ),
]
ShapeOption = Annotated[
    list[InputShape] | None,
    typer.Option(
        "--input-shape",
        parser=InputShape.parse,
        metavar="SHAPE",
        help="Shape of the example input, such as 1,3,224,224 (random numbers) or 1,128:int64 (zeros). Repeat for "
        "several inputs.",
        rich_help_panel=_MODEL,
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="A safetensors file to load first.", rich_help_panel=_MODEL),
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", min=0, help="Of random weights, inputs and the criterion 'random'.", rich_help_panel=_MODEL),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
RatioOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ratio",
        metavar="RATIO",
        help="Fraction of the channels to remove: 0.5, or name=0.5 for a module, parameter or pattern (repeat, or "
        "separate by commas).",
        rich_help_panel=_PLAN,
    ),
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Prove the pruned model.", rich_help_panel=_PLAN)
]


class _Work:
    """Progress of one command on standard error."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=steps)
        self._begun = False

    def step(self, text: str) -> None:
        """Say what begins now; what was going on before is done."""
        self._bar.update(self._task, description=text, advance=1 if self._begun else 0)
        self._begun = True

    def stop(self) -> None:
        """Give the terminal to another progress bar."""
        self._bar.stop()


@contextlib.contextmanager
def _working(steps: int) -> Iterator[_Work]:
    """Progress while inside; models print to standard error; errors of the user end the program with status 1."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
    try:
        bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        with bar, contextlib.redirect_stdout(sys.stderr):
            yield _Work(bar, steps)
    except (GraphPruneError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        typer.echo("error: " + " | ".join(lines), err=True)
        raise typer.Exit(1) from None


def _show(as_json: bool, data: dict[str, Any], *text: Any) -> None:
    """Print the result: `data` as JSON, or the tables and strings."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(render(*text))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(texts: list[str] | None) -> float | dict[str, float]:
    """0.5, or a dict from names."""
    items = [item.strip() for text in texts or ["0.5"] for item in text.split(",") if item.strip()]
    named: dict[str, float] = {}
    try:
        if len(items) == 1 and "=" not in items[0]:
            return float(items[0])
        for item in items:
            name, sign, value = item.rpartition("=")
            if not sign or not name or name in named:
                raise ValueError
            named[name] = float(value)
    except ValueError:
        raise typer.BadParameter(
            f"{' '.join(texts or [])!r} is neither a number nor a list of name=number with each name once",
            param_hint="--ratio",
        ) from None
    if not named:
        raise typer.BadParameter("expected a number or name=number", param_hint="--ratio")
    return named


def _checks(report: VerificationReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    checks = [{"name": c.name, "passed": c.passed, "error": _finite(c.error), "detail": c.detail} for c in report.checks]
    return {"passed": report.passed, "checks": checks}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"graphprune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# -- inspect


@app.command()
def inspect(
    model: ModelArgument,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    explain: Annotated[
        list[str] | None,
        typer.Option("--explain", metavar="NAME", help="What a parameter is tied to, or why it stays. Repeatable."),
    ] = None,
    draw: Annotated[
        list[Path] | None,
        typer.Option(
            "--draw",
            "--dot",
            "--svg",
            metavar="FILE",
            help="Draw the dependency graph, as .dot, .svg, .png or .pdf. Repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what can be pruned, what cannot and why, parameters and MACs. Changes nothing."""
    with _working(4) as work:
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
    kernels = sum(all(r.kind == "kernel" for r in f.reasons) and bool(f.reasons) for f in frozen)
    news = [str(f) for f in frozen if not f.reasons or any(r.kind != "kernel" for r in f.reasons)]
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
    _show(as_json, data, *text, *explained.values(), *(f"drawn: {path}" for path in files))


def _group(graph: DependencyGraph, index: int) -> dict[str, Any]:
    group = graph.groups[index]
    members = [
        {"parameter": m.parameter, "axis": m.axis, "role": m.role, "per_unit": int(m.positions.shape[1])}
        for m in group.members
    ]
    return {"index": index, "name": group.name, "kind": group.kind, "size": group.size, "members": members}


# -- prune


@app.command()
def prune(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="NAME", help="Writes NAME.plan.json and NAME.safetensors."),
    ] = Path("pruned"),
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    ratio: RatioOption = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Module, parameter or pattern whose outputs stay.", rich_help_panel=_PLAN),
    ] = None,
    scope: Annotated[str, typer.Option(help="local, global or isomorphic.", rich_help_panel=_PLAN)] = "local",
    criterion: Annotated[
        str, typer.Option(help="l1, l2, bn_scale, fpgm, lamp, random, or a registered name.", rich_help_panel=_PLAN)
    ] = "l2",
    round_to: Annotated[int, typer.Option(help="Keep multiples of this many.", rich_help_panel=_PLAN)] = 1,
    min_channels: Annotated[int, typer.Option(help="Keep at least this many.", rich_help_panel=_PLAN)] = 1,
    granularity: Annotated[
        list[str] | None,
        typer.Option(
            help="auto (default), channels, heads or 'head features'. Repeatable.",
            metavar="KIND",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    fold_bn: Annotated[
        bool,
        typer.Option("--fold-bn/--keep-bn", help="Merge batch norms, or keep them to train.", rich_help_panel=_PLAN),
    ] = True,
    verify_it: VerifyOption = True,
    as_json: JsonOption = False,
) -> None:
    """Prune a model, prove it, and write the plan (JSON) and the pruned weights (safetensors)."""
    wanted = _ratio(ratio)
    kinds = granularity or ["auto"]
    with _working(6) as work:
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        work.step("planning")
        decided = make_plan(
            loaded.model,
            example,
            wanted,
            ignore=ignore or (),
            scope=scope,
            criterion=criterion,
            round_to=round_to,
            min_channels=min_channels,
            granularity=kinds[0] if len(kinds) == 1 else kinds,
            fold_bn=fold_bn,
            seed=seed,
        )
        work.step("cutting")
        small = decided.apply(loaded.model)
        work.step("verifying" if verify_it else "not verifying")
        report = _proof(loaded, small, decided, example) if verify_it else None
        work.step("counting")
        before, after = count(loaded.model, example), count(small, example)
        work.step("writing")
        files: dict[str, str | None] = {"plan": f"{output}.plan.json", "weights": f"{output}.safetensors"}
        if any(tensor.is_meta for tensor in small.state_dict().values()):
            files["weights"] = None
        else:
            save_weights(small, f"{output}.safetensors")
        decided.save(f"{output}.plan.json")
    data = {
        "model": model,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "groups": [{"name": g.name, "kind": g.kind, "size": g.size, "kept": g.kept} for g in decided.groups],
        "frozen": list(decided.frozen),
        "folded": len(decided.folds),
        "verification": _checks(report),
        "files": files,
    }
    written = ", ".join(name for name in files.values() if name)
    if not files["weights"]:
        written += " (a model on the meta device has no weights to write)"
    proof = str(report) if report is not None else "not verified"
    _show(as_json, data, decided.summary(), _comparison(before, after), proof, f"written: {written}")


def _proof(loaded: Loaded, small: Any, decided: Plan, example: Any) -> VerificationReport:
    report = verify(loaded.model, small, decided, example)
    report.raise_on_failure()
    return report


def _comparison(before: Count, after: Count) -> Any:
    rows = [("parameters", before.parameters, after.parameters)]
    batch = "" if before.batch_size is None else f" at batch size {before.batch_size}"
    rows.append((f"MACs{batch}", before.macs, after.macs))
    columns = [
        Column("", 0, justify="left"),
        Column("before", 1, ","),
        Column("after", 2, ","),
        Column("removed", lambda row: 1 - row[2] / row[1] if row[1] else 0.0, ".1%"),
    ]
    return table(rows, columns)
