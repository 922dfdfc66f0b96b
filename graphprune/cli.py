"""The command line: `graphprune inspect | doctor | prune | export | bench`.

Models are named `module:function`; see `graphprune.factories.load_factory`. Results go to standard output, everything
else (progress, warnings, errors, what a model prints) to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ._version import __version__
from .counting import count
from .dependency import DependencyGraph, trace
from .deploy import benchmark, export_onnx
from .diagnosis.command import doctor_command
from .engine import plan as make_plan
from .factories import Loaded, common_input, load_factory, load_weights, save_weights
from .plans import Plan
from .report.files import check_target
from .report.tables import Column, table
from .terminal import (
    CriterionOption,
    DrawOption,
    ExplainOption,
    FoldOption,
    GranularityOption,
    IgnoreOption,
    JsonOption,
    LeastOption,
    ModelArgument,
    ModeOption,
    PlanOption,
    PrunedWeightsOption,
    RatioOption,
    RoundOption,
    ScopeOption,
    SeedOption,
    ShapeOption,
    VerifyOption,
    WeightsOption,
    checks_as_data,
    comparison,
    named_models,
    parse_integers,
    parse_ratio,
    show,
    working,
)
from .verification import VerificationReport, verify

app = typer.Typer(
    name="graphprune",
    help="Structured pruning of PyTorch models: look at one, prune it, export it to ONNX, measure it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    explain: ExplainOption = None,
    draw: DrawOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what can be pruned, what cannot and why, parameters and MACs. Changes nothing."""
    with working(4) as work:
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
    show(as_json, data, *text, *explained.values(), *(f"drawn: {path}" for path in files))


def _group(graph: DependencyGraph, index: int) -> dict[str, Any]:
    group = graph.groups[index]
    members = [
        {"parameter": m.parameter, "axis": m.axis, "role": m.role, "per_unit": int(m.positions.shape[1])}
        for m in group.members
    ]
    return {"index": index, "name": group.name, "kind": group.kind, "size": group.size, "members": members}


app.command("doctor")(doctor_command)


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
    ignore: IgnoreOption = None,
    scope: ScopeOption = "local",
    criterion: CriterionOption = "l2",
    round_to: RoundOption = 1,
    min_channels: LeastOption = 1,
    granularity: GranularityOption = None,
    fold_bn: FoldOption = True,
    output_mode: ModeOption = "module",
    verify_it: VerifyOption = True,
    as_json: JsonOption = False,
) -> None:
    """Prune a model, prove it, and write the plan (JSON) and the pruned weights (safetensors)."""
    wanted = parse_ratio(ratio)
    kinds = granularity or ["auto"]
    with working(6) as work:
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
            output=output_mode,
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
        "output": decided.output,
        "rewritten": [rewrite.module for rewrite in decided.rewrites],
        "verification": checks_as_data(report),
        "files": files,
    }
    written = ", ".join(name for name in files.values() if name)
    if not files["weights"]:
        written += " (a model on the meta device has no weights to write)"
    proof = str(report) if report is not None else "not verified"
    show(as_json, data, decided.summary(), comparison(before, after), proof, f"written: {written}")


def _proof(loaded: Loaded, small: Any, decided: Plan, example: Any) -> VerificationReport:
    report = verify(loaded.model, small, decided, example)
    report.raise_on_failure()
    return report


# -- export


@app.command()
def export(
    model: ModelArgument,
    path: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to write.", show_default=False)],
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    plan: PlanOption = None,
    ratio: RatioOption = None,
    pruned_weights: PrunedWeightsOption = None,
    verify_it: VerifyOption = True,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; the exporter's choice if not given.")] = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Only the example's batch size.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with PyTorch in ONNX Runtime.")] = True,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error; by data type if not given.")] = None,
    provider: Annotated[str, typer.Option(help="Where to compare: cpu, cuda or auto.")] = "cpu",
    external_data: Annotated[
        bool | None, typer.Option("--external-data/--one-file", help="Weights in a second file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as ONNX, pruned first where a plan or a ratio is given, and compare the file with PyTorch."""
    if plan is not None and ratio is not None:
        raise typer.BadParameter("give --plan or --ratio, not both", param_hint="--ratio")
    pruning = plan is not None or ratio is not None
    if pruned_weights is not None and not pruning:
        raise typer.BadParameter(
            "needs --plan or --ratio; use --weights for the whole model", param_hint="--pruned-weights"
        )
    wanted = parse_ratio(ratio) if ratio is not None else None
    with working(3 if pruning else 2) as work:
        work.step("building the model")
        check_target(path)
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        exported, decided, proof = loaded.model, None, None
        if pruning:
            work.step("pruning")
            decided = (
                Plan.load(plan) if plan is not None else make_plan(loaded.model, example, wanted or 0.0, seed=seed)
            )
            exported = decided.apply(loaded.model)
            proof = _proof(loaded, exported, decided, example) if verify_it else None
            if pruned_weights is not None:
                load_weights(exported, pruned_weights)
        work.step("exporting and comparing" if check else "exporting")
        report = export_onnx(
            exported,
            example,
            path,
            opset=opset,
            dynamic_batch=not fixed_batch,
            plan=decided,
            check=check,
            tolerance=tolerance,
            provider=provider,
            external_data=external_data,
        )
    data = {
        "model": model,
        "path": str(report.path),
        "external_data": None if report.external_data is None else str(report.external_data),
        **{
            name: getattr(report, name)
            for name in ("opset", "dynamic_batch", "batch_size", "nodes", "size", "tolerance")
        },
        "inputs": list(report.inputs),
        "outputs": list(report.outputs),
        "max_relative_error": report.max_relative_error,
        "checked_batch_sizes": list(report.checked_batch_sizes),
        "notes": list(report.notes),
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "verification": checks_as_data(proof),
    }
    show(as_json, data, *([str(proof)] if proof is not None else []), str(report))


# -- bench


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="MODULE:FUNCTION or the path of an ONNX file, each optionally as name=... Others are compared with "
            "the first.",
            show_default=False,
        ),
    ],
    input_shape: ShapeOption = None,
    seed: SeedOption = 0,
    provider: Annotated[str, typer.Option(help="auto (CUDA if it loads, else the CPU), cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads inside an operator.")] = 1,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="SIZES", help="Batch sizes, such as 1,8. Default: the example's.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Samples per model and batch size.")] = 30,
    warmup: Annotated[int, typer.Option(help="Calls before anything is measured.")] = 5,
    min_time: Annotated[float, typer.Option(help="Seconds that one sample lasts at least.")] = 0.01,
    baseline: Annotated[str | None, typer.Option(help="Name of the model to compare with.")] = None,
    provider_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the provider. Repeatable.")
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Capture and replay CUDA graphs.")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set of exports.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare exports with PyTorch.")] = True,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the latencies, as .png or .svg.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure models side by side in ONNX Runtime: latency, speed-up with its interval, size."""
    specs = named_models(models)
    sizes = parse_integers(batch)
    options = dict(item.partition("=")[::2] for item in provider_option or ())
    if not all(options) or any("=" not in item for item in provider_option or ()):
        raise typer.BadParameter("expected KEY=VALUE", param_hint="--provider-option")
    with working(2) as work:
        work.step("building the models")
        if plot is not None:
            check_target(plot)
        candidates: dict[str, Any] = {}
        made: list[Loaded] = []
        for name, spec in specs.items():
            if spec.endswith(".onnx"):
                candidates[name] = spec
            else:
                made.append(load_factory(spec, seed=seed))
                candidates[name] = made[-1].model
        files = [spec for spec in specs.values() if spec.endswith(".onnx")]
        example = common_input(made, files, input_shape or (), seed)
        work.stop()  # the benchmark has a bar of its own
        report = benchmark(
            candidates,
            example,
            provider=provider,
            threads=threads,
            batch_sizes=sizes,
            warmup=warmup,
            rounds=rounds,
            min_time=min_time,
            baseline=baseline,
            provider_options=options or None,
            cuda_graph=cuda_graph,
            opset=opset,
            check=check,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        if plot is not None:
            report.plot(plot)
    show(as_json, report.to_dict(), str(report), *([f"drawn: {plot}"] if plot is not None else []))


def main() -> None:
    """The entry point of the command `graphprune`."""
    app(prog_name="graphprune")


if __name__ == "__main__":
    main()
