"""`advise`: which method fits a model and a target, with numbers from the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...deployment import benchmark
from ...errors import GraphPruneError
from ...recovery.training.evaluation import evaluator, metric_name
from ...runtimes.machine import cpu_model, usable_cores
from ...sparsity import masks, semi_structured_support
from ...support.doors import door
from ...support.numbers import check_number
from ...support.progress import ProgressOption, reported, stage
from ...support.suggestions import check_choice
from ...support.tables import Column, render, table
from ...synthesis import made_for
from ...tracing.counting import at_batch_size
from ...tracing.example import ExampleInput
from .candidates import Option, Outputs, Trial, check_real
from .doctor import Doctor, doctor

GOALS = ("speed", "size", "resources")
# Share of the outputs' variance that must be kept: nearly all where nothing repairs it later, half where training does.
_KEPT, _TRAINABLE = 0.95, 0.5
# Without data nothing is repaired before training, and outputs say little: what is usual then.
_USUAL_RATIO = 0.5


@dataclasses.dataclass(frozen=True)
class Advice:
    """What `advise` recommends.

    `recommended`: the option, or None where nothing can be pruned; `reasons`: why, and what to do around it; `options`:
    all that was tried, with the numbers it gave on this model; `facts`: what was found out about model and machine.
    """

    model: str
    goal: str
    recommended: Option | None
    reasons: tuple[str, ...]
    options: tuple[Option, ...]
    facts: tuple[str, ...]
    metric: str | None = None

    def table(self) -> Table:
        """The options as a `rich` table; the recommended one is marked."""
        columns = [
            Column("", lambda o: ">" if o is self.recommended else "", justify="left"),
            Column("method", "method", justify="left"),
            Column("amount", lambda o: ", ".join(f"{a:g}" for a in o.amount)),
            Column("fewer parameters", "parameters", _times),
            Column("fewer MACs", "macs", _times),
            Column("smaller file", "bytes", _times),
        ]
        if any(option.speedup is not None for option in self.options):
            columns.append(Column("faster", "speedup", _times))
        columns.append(Column("outputs kept", "fidelity", lambda f: f"{max(0.0, f):.1%}"))
        if self.metric is not None:
            columns.append(Column(self.metric, "score", ".4f"))
        return table(self.options, columns, title="Tried on this model, before any training")

    def __str__(self) -> str:
        head = [f"{self.model}, goal: {self.goal}", *(f"  {fact}" for fact in self.facts), ""]
        if self.recommended is None:
            return render(*head, *self.reasons)
        chosen = f"Recommended: {self.recommended.method}, {', '.join(f'{a:g}' for a in self.recommended.amount)}"
        lines = [f"  {self.recommended.call}", *(f"- {reason}" for reason in self.reasons)]
        return render(*head, self.table(), "", chosen, *lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = [{**dataclasses.asdict(o), "amount": list(o.amount)} for o in self.options]
        place = None if self.recommended is None else self.options.index(self.recommended)
        return {**data, "options": options, "recommended": None if place is None else options[place],
                "reasons": list(self.reasons), "facts": list(self.facts)}  # fmt: skip


def _times(value: float) -> str:
    return f"{value:.2f}x"


@door("model")
@reported("advice")
def advise(
    model: nn.Module,
    example_input: Any,
    goal: str = "speed",
    *,
    finetune: bool = False,
    data: Any = None,
    evaluate: Any = None,
    tolerance: float = 0.01,
    speed: bool = False,
    progress: ProgressOption = None,
) -> Advice:
    """Recommend a pruning method for `model`, which is not changed. Methods are tried on copies, without training.

    - `goal`: "speed" (fast inference), "size" (smallest file) or "resources" (little memory and little arithmetic).
    - `finetune`: whether you can train afterwards. `data`: calibration inputs, or (inputs, targets): channels are then
      chosen and repaired by least squares, and outputs are compared on them instead of on the example alone.
    - `evaluate`: a function (model) -> score, higher is better, or data for top-1 accuracy: options may then lose
      `tolerance` at most (without fine-tuning). Without it options are judged by the share of the outputs' variance
      that they keep: 95 %, or half of it where training can repair the rest.
    - `speed`: measure the latency of structured options in ONNX Runtime here, and rank by it.
    - `progress`: as in `plan`.

    Every number comes from this model: parameters, MACs and file sizes are counted on networks and files that were
    made.

    Raises GraphPruneError for an unknown goal, arguments out of range, masked models and models that fail.
    """
    check_choice("goal", goal, GOALS)
    check_number("tolerance", tolerance)
    check_real(model)
    if masks(model):
        raise GraphPruneError("advise: the model has masks already; make them permanent first")
    example, ask = ExampleInput.of(example_input), evaluator(evaluate)
    data = made_for(data, model, example_input)
    found = doctor(model, example_input)
    dense = None if ask is None else ask(model)
    trial = Trial(model, example, data, Outputs(model, example, data), ask)
    with stage("trying methods"):
        options = _tried(trial, goal, example_input, speed)
    good = _judge(dense, tolerance, finetune, data is not None)
    chosen = _choose(options, goal, good)
    reasons = _reasons(chosen, goal, good, options, found, model, finetune, data)
    facts = _facts(found, model, dense, evaluate)
    return Advice(type(model).__name__, goal, chosen, reasons, options, facts, metric_name(evaluate) if ask else None)


def _tried(trial: Trial, goal: str, example_input: Any, speed: bool) -> tuple[Option, ...]:
    structured = [*trial.channels(), *trial.layers()]
    options = [option for option, _ in structured]
    if speed and structured:
        networks = {"dense": trial.model} | {f"{o.method} {o.amount[0]:g}": small for o, small in structured}
        measured = benchmark(networks, example_input, rounds=20)
        rows = [measured.row(f"{o.method} {o.amount[0]:g}") for o in options]
        options = [dataclasses.replace(o, speedup=row.speedup) for o, row in zip(options, rows, strict=True)]
    cut = [o.amount[0] for o in options if o.method == "channels"]
    if goal != "speed":
        options += trial.masks()
        if cut:
            options += trial.both(cut[len(cut) // 2])
    elif semi_structured_support() is None:
        options.append(trial.two_of_four())
    return tuple(options)


Judge = Callable[[Option], bool]


def _judge(dense: float | None, tolerance: float, finetune: bool, data: bool) -> Judge:
    def good(option: Option) -> bool:
        if dense is not None and option.score is not None and not finetune:
            return option.score >= dense - tolerance
        if finetune and not data and option.method.startswith("channels"):
            return option.method == "channels" and option.amount[0] <= _USUAL_RATIO
        return option.fidelity is not None and option.fidelity >= (_TRAINABLE if finetune else _KEPT)

    return good


def _gain(option: Option, goal: str) -> float:
    if goal == "size":
        return option.bytes
    work = option.macs if option.speedup is None else option.speedup
    return work if goal == "speed" else work * option.bytes


def _choose(options: tuple[Option, ...], goal: str, good: Judge) -> Option | None:
    """The option that gains most among the good ones; else the one that does least harm."""
    fitting = [o for o in options if good(o) and _gain(o, goal) > 1]
    if fitting:
        return max(fitting, key=lambda o: _gain(o, goal))
    return max(options, key=lambda o: (o.fidelity if o.fidelity is not None else -1.0), default=None)


def _reasons(
    chosen: Option | None, goal: str, good: Judge, options: tuple[Option, ...], found: Doctor, model: nn.Module,
    finetune: bool, data: Any,
) -> tuple[str, ...]:  # fmt: skip
    if chosen is None:
        why = found.blockers[0].reason if found.blockers else "it has no channels between two layers"
        return (f"Nothing can be removed for this goal: {why}", 'try goal="size", or see graphprune.doctor')
    out = []
    if not good(chosen):
        out.append("no option keeps enough without training; this one loses least: check its accuracy")
    elif finetune and data is None and chosen.method == "channels":
        out.append(
            f"without data nothing tells how much training will bring back; at most {_USUAL_RATIO:.0%} of the channels "
            f"is usual"
        )
    gains = {
        "speed": f"{chosen.macs:.2f}x fewer multiply-accumulates, in layers that stay dense",
        "size": f"a file {chosen.bytes:.2f}x smaller than the dense one",
        "resources": f"{chosen.macs:.2f}x fewer multiply-accumulates and a file {chosen.bytes:.2f}x smaller",
    }
    out.append(gains[goal])
    if chosen.speedup is not None:
        out.append(f"measured here: {chosen.speedup:.2f}x faster")
    if goal == "speed" and chosen.method in ("channels", "layers"):
        out.append("zeros alone would not be faster: runtimes multiply by them like by any other number")
    if chosen.method == "masks":
        out.append("the network computes as much as before: zeros make the file small, not the work")
    if goal == "size" and chosen.method == "masks" and (best := _best(options, "channels", good)):
        out.append(f"removing channels would make it {best.bytes:.2f}x smaller at most")
    out += _advice_on_training(chosen, finetune, data, model)
    return tuple(out)


def _best(options: tuple[Option, ...], method: str, good: Judge) -> Option | None:
    return max((o for o in options if o.method == method and good(o)), key=lambda o: o.bytes, default=None)


def _advice_on_training(chosen: Option, finetune: bool, data: Any, model: nn.Module) -> list[str]:
    structured = chosen.method.startswith("channels")
    out = []
    if finetune:
        kinds = [kind for kind in ("channels", "layers", "masks") if kind in chosen.method]
        for kind, amount in zip(kinds, chosen.amount, strict=True):
            method = "magnitude" if kind == "masks" else kind
            course = "" if kind == "layers" else 'schedule="cubic", '
            out.append(
                f'in training: graphprune.pipeline(model, example_input, data, {amount:g}, method="{method}", '
                f"{course}distillation=True)"
            )
        if structured and any(isinstance(m, _BatchNorm) for m in model.modules()):
            out.append("keep the batch norms for training (fold_bn=False; pipeline does), and fold them afterwards")
    elif structured and data is None:
        out.append("pass data (some hundred unlabelled inputs): channels are then chosen and repaired by least squares")
    return out


def _facts(found: Doctor, model: nn.Module, dense: float | None, evaluate: Any) -> tuple[str, ...]:
    def share(part: int, whole: int) -> str:
        return f"{part / whole:.0%}" if whole else "none"

    parameters, macs = share(found.prunable_parameters, found.parameters), share(found.prunable_macs, found.macs)
    facts = [
        f"{found.parameters:,} parameters and {found.macs:,} MACs of one call{at_batch_size(found.batch_size)}, "
        f"{parameters} and {macs} of them on channels that can be removed"
    ]
    literal = [b for b in found.blockers if b.kind in ("size", "literal")]
    if literal:
        facts.append(
            f"{literal[0].source or 'your code'} holds {share(literal[0].parameters, found.parameters)} of the "
            f'parameters by a size it writes; output="hybrid" rewrites it'
        )
    if dense is not None:
        facts.append(f"{metric_name(evaluate)} before pruning: {dense:.4f}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    gpu = semi_structured_support()
    facts.append(f"on {device}; {cpu_model()}, {usable_cores()} cores; 2:4 sparse GPU kernels: {gpu or 'available'}")
    return tuple(facts)
