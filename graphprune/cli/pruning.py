"""The command prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..planning.calls import plan as make_plan
from ..planning.calls import repaired
from ..planning.request import options_in
from ..plans.history import repair_after
from ..plans.storage import save
from ..recovery import check_method
from ..tracing.counting import count
from .factories import load_data, load_factory
from .proof import proof_of
from .terminal import (
    AllowOption,
    BudgetOption,
    CriterionOption,
    DataOption,
    FoldOption,
    GranularityOption,
    IgnoreOption,
    JsonOption,
    LayerCriterionOption,
    LeastOption,
    ModelArgument,
    ModeOption,
    PrecisionOption,
    ProviderOption,
    QuietOption,
    RatioOption,
    RecoverOption,
    RoundOption,
    ScopeOption,
    SeedOption,
    ShapeOption,
    SizesOption,
    TableOption,
    ThreadsOption,
    VerifyOption,
    WeightsOption,
    WhereOption,
    budget_of,
    checks_as_data,
    comparison,
    parse_limits,
    parse_ratio,
    parse_round_to,
    parse_sizes,
    parse_target,
    show,
    working,
)


def prune(
    model: ModelArgument,
    written: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="NAME", help="Writes NAME.plan.json and NAME.safetensors."),
    ] = Path("pruned"),
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    ratio: RatioOption = None,
    budget: BudgetOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
    runtime: WhereOption = None,
    precision: PrecisionOption = None,
    latency_table: TableOption = None,
    ignore: IgnoreOption = None,
    sizes: SizesOption = None,
    scope: ScopeOption = "local",
    criterion: CriterionOption = None,
    data: DataOption = None,
    layer_criterion: LayerCriterionOption = None,
    round_to: RoundOption = "auto",
    min_channels: LeastOption = 1,
    granularity: GranularityOption = None,
    fold_bn: FoldOption = True,
    output: ModeOption = "module",
    recover: RecoverOption = "auto",
    allow_nothing: AllowOption = False,
    verify_it: VerifyOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune a model, prove it, and write the plan (JSON) and the pruned model (safetensors)."""
    if ratio and budget:
        raise typer.BadParameter("give only one of --ratio and --budget", param_hint="--budget")
    limits = parse_limits(budget)
    options = options_in(locals()) | {
        "ratio": None if limits else parse_ratio(ratio),
        "ignore": ignore or (),
        "sizes": parse_sizes(sizes),
        "round_to": parse_round_to(round_to),
        "granularity": granularity if granularity and granularity[1:] else (granularity or ["auto"])[0],
        "strict": not allow_nothing,
    }
    method = None if recover == "none" else recover
    with working("prune", quiet) as work:
        check_method(method, data)
        options["target"] = parse_target(
            provider=provider, threads=threads, table=latency_table, runtime=runtime, precision=precision
        )
        work.step("building the model")
        loaded = load_factory(model, weights=weights, seed=seed)
        example = loaded.input(input_shape or (), seed)
        batches = None if data is None else load_data(data, seed=seed)[0]
        work.step("planning")
        decided = make_plan(loaded.model, example, **{**options, "data": batches, "budget": budget_of(limits)})
        work.step("cutting")
        small = decided.apply(loaded.model)
        work.step("verifying" if verify_it else "not verifying")
        report = proof_of(loaded, small, decided, example) if verify_it else None
        small = repaired(loaded.model, decided, small, example, batches, method)
        work.step("counting")
        before, after = count(loaded.model, example), count(small, example)
        work.step("writing")
        files: dict[str, str | None] = {"plan": f"{written}.plan.json", "weights": f"{written}.safetensors"}
        if any(tensor.is_meta for tensor in small.state_dict().values()):
            files["weights"] = None
        else:
            save(small, f"{written}.safetensors")
        decided.save(f"{written}.plan.json")
    facts = {
        "model": model,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "groups": [
            {"name": g.name, "kind": g.kind, "size": g.size, "asked": g.asked, "kept": g.kept} for g in decided.groups
        ],
        "layers": [block.module for block in decided.layers],
        "frozen": list(decided.frozen),
        "unsettled": [str(size) for size in decided.unsettled],
        "folded": len(decided.folds),
        "output": decided.output,
        "latency": None if decided.latency is None else decided.latency.to_dict(),
        "rewritten": [rewrite.module for rewrite in decided.rewrites],
        "verification": checks_as_data(report),
        "repaired": repair_after(small, decided) or None,
        "files": files,
    }
    names = ", ".join(name for name in files.values() if name)
    if not files["weights"]:
        names += " (a model on the meta device has no weights to write)"
    proof = str(report) if report is not None else "not verified"
    if repair_after(small, decided):
        proof += f"\nrepaired afterwards: {repair_after(small, decided)}, from " + (
            "stored statistics" if batches is None else "what layers read on the data"
        )
    show(as_json, facts, decided.summary(), comparison(before, after), proof, f"written: {names}")
