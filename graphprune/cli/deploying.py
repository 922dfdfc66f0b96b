"""The commands export and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..deployment import benchmark
from ..deployment import export as export_to
from ..planning.calls import plan as make_plan
from ..plans.plan import Plan
from ..plans.storage import load
from ..runtimes import export_onnx
from ..support.files import check_target
from .factories import Loaded, common_input, load_data, load_factory
from .proof import proof_of
from .terminal import (
    AllowOption,
    JsonOption,
    ModelArgument,
    PlanOption,
    PrunedOption,
    QuietOption,
    RatioOption,
    SeedOption,
    ShapeOption,
    VerifyOption,
    WeightsOption,
    checks_as_data,
    is_network_file,
    named_models,
    parse_integers,
    parse_ratio,
    show,
    working,
)

CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="MODULE:FUNCTION",
        help="Function that returns batches to calibrate int8 with, or synthetic:64 for inputs made from the model.",
        show_default=False,
    ),
]
SamplesOption = Annotated[int, typer.Option("--samples", help="How many of them are used at most.", min=1)]


def export(
    model: ModelArgument,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The file to write: .onnx, or as the runtime's files end.", show_default=False
        ),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Write for this runtime, run it there, compare and time it; see the command runtimes. NAME=PYTHON "
            "with the interpreter of another environment that has it.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8.", show_default=False)] = None,
    data: CalibrationOption = None,
    samples: SamplesOption = 300,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    plan: PlanOption = None,
    ratio: RatioOption = None,
    pruned: PrunedOption = None,
    allow_nothing: AllowOption = False,
    verify_it: VerifyOption = True,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; the exporter's choice if not given.")] = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Only the example's batch size.")] = False,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT:AXIS=NAME",
            help="An axis that is free, and its name in the ONNX file: ids:1=length, mask:1=past+length. Repeatable.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with PyTorch in ONNX Runtime.")] = True,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error; by data type if not given.")] = None,
    provider: Annotated[str, typer.Option(help="Where to compare: cpu, cuda or auto.")] = "cpu",
    external_data: Annotated[
        bool | None, typer.Option("--external-data/--one-file", help="Weights in a second file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a model as ONNX, pruned where --pruned, --plan or --ratio says so, and compare the file with PyTorch; with
    --runtime or --precision for any runtime, and measured there."""
    if sum(option is not None for option in (plan, ratio, pruned)) > 1:
        raise typer.BadParameter("give only one of --pruned, --plan and --ratio", param_hint="--ratio")
    elsewhere = runtime is not None or precision is not None
    for name, value in (("--opset", opset), ("--external-data", external_data), ("--dynamic", dynamic or None)):
        if elsewhere and value is not None:
            raise typer.BadParameter("is for plain ONNX files: leave out --runtime and --precision", param_hint=name)
    free_axes = _free_axes(dynamic)
    pruning = plan is not None or ratio is not None
    wanted = parse_ratio(ratio) if ratio is not None else None
    with working("export", quiet) as work:
        work.step("building the model")
        check_target(path)
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        exported, decided, proof = loaded.model, None, None
        if pruned is not None:
            exported = load(pruned, loaded.model)
        if pruning:
            work.step("pruning")
            decided = (
                Plan.load(plan)
                if plan is not None
                else make_plan(loaded.model, example, wanted or 0.0, seed=seed, strict=not allow_nothing)
            )
            exported = decided.apply(loaded.model)
            proof = proof_of(loaded, exported, decided, example) if verify_it else None
        work.step("exporting and comparing" if check else "exporting")
        report = made = None
        if elsewhere:
            name, python = _named_runtime(runtime or "onnxruntime")
            made = export_to(
                exported, example, path, name, precision or "fp32", python=python,
                data=None if data is None else load_data(data, seed=seed)[0], samples=samples,
                dynamic_batch=not fixed_batch, check=check, tolerance=tolerance, seed=seed,
                provider=None if provider == "cpu" else provider,
            )  # fmt: skip
        else:
            report = export_onnx(
                exported,
                example,
                path,
                opset=opset,
                dynamic_batch=not fixed_batch,
                dynamic_shapes=free_axes,
                plan=decided,
                check=check,
                tolerance=tolerance,
                provider=provider,
                external_data=external_data,
            )
    proofs = [str(proof)] if proof is not None else []
    if made is not None:
        show(as_json, {"model": model, **made.to_dict(), "verification": checks_as_data(proof)}, *proofs, str(made))
        return
    assert report is not None
    shown = {
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
        "dynamic_axes": {name: {str(a): d for a, d in own.items()} for name, own in report.dynamic_axes.items()},
        "checked_sizes": [dict(sizes) for sizes in report.checked_sizes],
        "notes": list(report.notes),
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "verification": checks_as_data(proof),
    }
    show(as_json, shown, *proofs, str(report))


def _free_axes(given: list[str] | None) -> dict[str, dict[int, str]] | None:
    """The options --dynamic as `dynamic_shapes`: INPUT:AXIS=NAME each."""
    found: dict[str, dict[int, str]] = {}
    for item in given or ():
        place, _, name = item.partition("=")
        argument, _, axis = place.rpartition(":")
        if not (argument and name and axis.isdecimal()):
            raise typer.BadParameter(
                f"expected INPUT:AXIS=NAME, such as ids:1=length, got {item!r}", param_hint="--dynamic"
            )
        if found.setdefault(argument, {}).setdefault(int(axis), name) != name:
            raise typer.BadParameter(f"axis {axis} of {argument!r} has two names", param_hint="--dynamic")
    return found or None


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="MODULE:FUNCTION or the path of an ONNX file (with --runtime of any file that it takes), each "
            "optionally as name=... Others are compared with the first.",
            show_default=False,
        ),
    ],
    input_shape: ShapeOption = None,
    seed: SeedOption = 0,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Where to measure: a name that the command runtimes lists, all, or NAME=PYTHON with the interpreter "
            "of another environment. Repeatable. Default: ONNX Runtime.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="fp32 (default), bf16, fp16, int8. Repeatable.", show_default=False),
    ] = None,
    data: CalibrationOption = None,
    samples: SamplesOption = 300,
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
    quiet: QuietOption = False,
) -> None:
    """Measure models side by side in ONNX Runtime: latency, speed-up with its interval, size."""
    specs = named_models(models)
    sizes = parse_integers(batch)
    options = dict(item.partition("=")[::2] for item in provider_option or ())
    if not all(options) or any("=" not in item for item in provider_option or ()):
        raise typer.BadParameter("expected KEY=VALUE", param_hint="--provider-option")
    with working("bench", quiet) as work:
        work.step("building the models")
        if plot is not None:
            check_target(plot)
        candidates: dict[str, Any] = {}
        made: list[Loaded] = []
        for name, spec in specs.items():
            if is_network_file(spec):
                candidates[name] = spec
            else:
                made.append(load_factory(spec, seed=seed))
                candidates[name] = made[-1].model
        files = [spec for spec in specs.values() if is_network_file(spec)]
        example = common_input(made, files, input_shape or (), seed)
        work.step("measuring")
        report = benchmark(
            candidates,
            example,
            runtimes=_named_runtimes(runtime),
            precisions=precision,
            data=None if data is None else load_data(data, seed=seed)[0],
            samples=samples,
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
        )
        if plot is not None:
            report.plot(plot)
    show(as_json, report.to_dict(), str(report), *([f"drawn: {plot}"] if plot is not None else []))


def _named_runtimes(given: list[str] | None) -> str | dict[str, str | None] | None:
    """The option --runtime, NAME or NAME=PYTHON each."""
    if not given:
        return None
    if given == ["all"]:
        return "all"
    return dict(map(_named_runtime, given))


def _named_runtime(given: str) -> tuple[str, str | None]:
    """NAME or NAME=PYTHON."""
    name, mark, python = given.partition("=")
    return name, python if mark else None
