"""What the commands share: options, progress on standard error, results on standard output, parsing of lists."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import GraphPruneError, GraphPruneWarning
from ..planning.allocation import BUDGETS, Budget
from ..planning.request import GRANULARITIES
from ..plans.verification import VerificationReport
from ..runtimes.adapters import RUNTIMES
from ..runtimes.latency import Target
from ..support.progress import reporting, stage
from ..support.tables import Column, render, table
from ..tracing.counting import Count, at_batch_size
from .factories import InputShape

_MODEL = "Model"
_PRUNING = "How to prune"
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="Function without arguments that returns a model, or (model, example input). The current directory is "
        "searched first.",
        show_default=False,
    ),
]


def _option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


ShapeOption = Annotated[
    list[InputShape] | None,
    _option(
        _MODEL,
        "Shape of the example input, such as 1,3,224,224 (random numbers) or 1,128:int64 (zeros). Repeat it for "
        "several inputs.",
        "--input-shape",
        parser=InputShape.parse,
        metavar="SHAPE",
    ),
]
WeightsOption = Annotated[Path | None, _option(_MODEL, "Safetensors file to load first.", "--weights", metavar="FILE")]
SeedOption = Annotated[int, _option(_MODEL, "Of random weights, inputs and the criterion 'random'.", "--seed", min=0)]
RatioOption = Annotated[
    list[str] | None,
    _option(
        _PRUNING,
        "Fraction of the channels to remove: 0.5, or name=0.5 for a module, parameter or pattern (repeat it, or "
        "separate by commas; what no name matches stays whole). prune takes 0.5 if not told.",
        "--ratio",
        metavar="RATIO",
    ),
]
IgnoreOption = Annotated[
    list[str] | None,
    _option(_PRUNING, "Module, parameter or pattern whose outputs stay. Repeatable.", "--ignore", metavar="NAME"),
]
SizesOption = Annotated[
    list[str] | None,
    _option(
        _PRUNING,
        "NAME=follow or NAME=hold: what becomes of a number that modules keep and the call does not read. Repeatable.",
        "--size",
        metavar="NAME=CHOICE",
    ),
]
ScopeOption = Annotated[str, _option(_PRUNING, "Rank channels local, global or isomorphic.", "--scope")]
ModeOption = Annotated[
    str,
    _option(
        _PRUNING,
        "Where a size written in code blocks: module (keep it), hybrid (that module becomes a graph) or graph (all).",
        "--output-mode",
    ),
]
CriterionOption = Annotated[
    str | None,
    _option(
        _PRUNING,
        "flow (default), l1, l2, bn_scale, fpgm, lamp, random, with data reconstruction and others, or one that the "
        "module registers.",
        "--criterion",
    ),
]
LayerCriterionOption = Annotated[
    str | None,
    _option(
        _PRUNING,
        "How layers are ranked where channels go too: block_influence (default), output, magnitude, latency.",
        "--layer-criterion",
    ),
]
RoundOption = Annotated[
    str,
    _option(
        _PRUNING,
        'Keep multiples of this many channels; "auto" (default): of 16, 8 and 4, what no runtime is slower with.',
        "--round-to",
    ),
]
RecoverOption = Annotated[
    str,
    _option(
        _PRUNING,
        'Repair of what was lost: "auto" (default: least squares with data, else from what the model stores), "mean", '
        '"moments", "batchnorm", "least_squares", "blocks" (least squares, then blocks by gradient) or "none".',
        "--recover",
    ),
]
DataOption = Annotated[
    str | None,
    _option(
        _PRUNING,
        "Function that returns batches for criteria and repairs that look at data, or synthetic (synthetic:64): inputs "
        "made from the model itself.",
        "--data",
        metavar="MODULE:FUNCTION",
    ),
]
LeastOption = Annotated[int, _option(_PRUNING, "Keep at least this many channels.", "--min-channels")]
GranularityOption = Annotated[
    list[str] | None,
    _option(
        _PRUNING,
        f"{', '.join(GRANULARITIES)}, or one that the module registers. Repeatable; layer or branch with others takes "
        "a budget.",
        "--granularity",
        metavar="KIND",
    ),
]
BudgetOption = Annotated[
    list[str] | None,
    _option(
        _PRUNING,
        "Instead of a ratio, a limit for the whole network: macs=0.5, params=0.5, memory=0.5 (a fraction, or a count), "
        "latency=0.5, latency_ms=3, or one that the module registers. Repeat it, or separate by commas.",
        "--budget",
        metavar="LIMIT",
    ),
]
ProviderOption = Annotated[
    str | None, _option(_PRUNING, "Where latency counts: auto (default), cpu, cuda or a full name.", "--provider")
]
ThreadsOption = Annotated[int | None, _option(_PRUNING, "Threads that latency is for (default 1).", "--threads", min=1)]
WhereOption = Annotated[
    str | None,
    _option(_PRUNING, "The runtime that latency is for (default onnxruntime), as the command runtimes lists them.",
            "--runtime"),
]
PrecisionOption = Annotated[
    str | None, _option(_PRUNING, "The precision that latency is for: fp32 (default), bf16, fp16, int8.", "--precision")
]
TableOption = Annotated[
    Path | None,
    _option(_PRUNING, "A file of the command latency-table: nothing is measured here.", "--latency-table"),
]
FoldOption = Annotated[
    bool, _option(_PRUNING, "Merge batch norms into layers, or keep them for training.", "--fold-bn/--keep-bn")
]
AllowOption = Annotated[
    bool,
    _option(
        _PRUNING, "Go on, with a warning, where nothing was removed of what was asked for.", "--allow-nothing"
    ),
]
VerifyOption = Annotated[bool, _option(_PRUNING, "Prove the pruned model.", "--verify/--no-verify")]
PlanOption = Annotated[Path | None, _option(_PRUNING, "A plan that the command prune wrote.", "--plan", metavar="FILE")]
PrunedOption = Annotated[
    Path | None,
    _option(_PRUNING, "A pruned model that the command prune or graphprune.save wrote.", "--pruned", metavar="FILE"),
]
ExplainOption = Annotated[
    list[str] | None,
    typer.Option("--explain", metavar="NAME", help="What a parameter is tied to, or why it stays. Repeatable."),
]
DrawOption = Annotated[
    list[Path] | None,
    typer.Option("--draw", "--dot", "--svg", metavar="FILE", help="Draw as .dot, .svg, .png or .pdf. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No line of progress on the terminal.")]


class Work:
    """What one command does, step by step, each a stage of its progress."""

    def __init__(self) -> None:
        self.steps = contextlib.ExitStack()

    def step(self, text: str) -> None:
        """Say what begins now; what was going on before is done."""
        self.steps.close()
        self.steps.enter_context(stage(text))


@contextlib.contextmanager
def working(command: str, quiet: bool) -> Iterator[Work]:
    """Progress while inside, unless `quiet`; models print to standard error; errors of the user end the program with
    status 1."""
    work = Work()
    try:
        told = reporting(False if quiet else None, command)
        with told, work.steps, contextlib.redirect_stdout(sys.stderr), _warnings_told():
            yield work
    except (GraphPruneError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        typer.echo("error: " + " | ".join(lines), err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Our own warnings as one line of the command, without a line of code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", GraphPruneWarning)
        others = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, GraphPruneWarning):
                typer.echo(f"warning: {message}", err=True)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = tell
        yield


def show(as_json: bool, data: dict[str, Any], *text: Any) -> None:
    """Print the result: `data` as JSON, or the tables and strings."""
    if as_json:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo(render(*text))


def parse_limits(given: Sequence[str] | None) -> dict[str, float]:
    """What `--budget` options say, by name; nothing without any. The names are not looked up: the model's module may
    register some."""
    limits: dict[str, float] = {}
    for part in (p.strip() for text in given or () for p in text.split(",")):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or name in limits or math.isnan(number):
            raise typer.BadParameter(
                f"{part!r}: expected one of {BUDGETS.listed()}, each once, as in macs=0.5", param_hint="--budget"
            )
        limits[name] = number
    return limits


def budget_of(limits: dict[str, float]) -> Budget | None:
    """The budget of these limits; None without any."""
    if not limits:
        return None
    try:
        return Budget(**limits)
    except GraphPruneError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from None


def parse_target(**given: Any) -> Target | None:
    """The target of those of these options that were given; None without any."""
    named = {name: value for name, value in given.items() if value is not None}
    return Target(**named) if named else None


def parse_ratio(texts: list[str] | None) -> float | dict[str, float]:
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


def parse_sizes(texts: list[str] | None) -> dict[str, str]:
    """What becomes of attributes, by name."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, sign, choice = text.rpartition("=")
        if not sign or not name or name in found:
            raise typer.BadParameter(f"{text!r} is no NAME=follow or NAME=hold, each name once", param_hint="--size")
        found[name] = choice
    return found


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """["scope=global", "round_to=8"] as a dict; values are read as JSON where they are JSON, else as text."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name or name in found:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE with each name once", param_hint="--option")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def is_network_file(spec: str) -> bool:
    """Whether a text names a file that a runtime takes, by its ending."""
    return any(spec.endswith(kind.suffix) for kind in RUNTIMES.values())


def named_models(specs: list[str]) -> dict[str, str]:
    """A name for each: the one given, the function or the file without its ending; the whole where that is taken."""
    named: dict[str, str] = {}
    for text in specs:
        name, sign, spec = text.partition("=")
        if not sign:
            name, spec = "", text
        if not spec or (not is_network_file(spec) and ":" not in spec):
            kinds = ", ".join(dict.fromkeys(kind.suffix for kind in RUNTIMES.values()))
            raise typer.BadParameter(f"{spec!r} is neither MODULE:FUNCTION nor a file ({kinds})", param_hint="MODEL")
        if not name:
            name = Path(spec).stem if is_network_file(spec) else spec.rpartition(":")[2]
            name = spec if name in named else name
        if name in named:
            raise typer.BadParameter(f"two models are called {name!r}; write name=...", param_hint="MODEL")
        named[name] = spec
    return named


def parse_round_to(text: str) -> int | str:
    """A number, or "auto"."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f'{text!r} is neither "auto" nor a number', param_hint="--round-to") from None


def parse_integers(texts: list[str] | None) -> list[int] | None:
    """["1,8", "16"] as [1, 8, 16]; None stays None."""
    if texts is None:
        return None
    try:
        return [int(item) for text in texts for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{' '.join(texts)!r} is no list of integers", param_hint="--batch") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def checks_as_data(report: VerificationReport | None) -> dict[str, Any] | None:
    """A verification for JSON, which has no NaN."""
    if report is None:
        return None
    checks = [
        {"name": c.name, "passed": c.passed, "error": _finite(c.error), "detail": c.detail} for c in report.checks
    ]
    return {"passed": report.passed, "checks": checks}


def comparison(before: Count, after: Count) -> Table:
    """Parameters and MACs before and after, and what share is gone."""
    rows = [("parameters", before.parameters, after.parameters)]
    rows.append((f"MACs{at_batch_size(before.batch_size)}", before.macs, after.macs))
    columns = [
        Column("", 0, justify="left"),
        Column("before", 1, ","),
        Column("after", 2, ","),
        Column("removed", lambda row: 1 - row[2] / row[1] if row[1] else 0.0, ".1%"),
    ]
    return table(rows, columns)
