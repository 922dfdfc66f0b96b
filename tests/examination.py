"""One network, pruned by the public functions and held against every oracle."""

from __future__ import annotations

import collections
import dataclasses
import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graphprune
from graphprune.plans.verification.oracles import permutable
from tests import oracles
from tests.networks import random_network, random_program

EXACT = 1e-9
"""The kept weights are the same numbers and everything is compared in double precision."""
ROUNDED = 1e-5
"""Where the engine has computed new weights in single precision: folded norms, changed attention temperatures."""


@dataclasses.dataclass
class Outcome:
    """`share`: the fraction of parameters removed; `reason`: why nothing was; `problems`: what is wrong, in words;
    `crash`: the error that ended the examination."""

    share: float = 0.0
    reason: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.problems or self.crash)

    def __str__(self) -> str:
        if self.crash:
            return f"CRASH  {self.crash}"
        if self.problems:
            return "WRONG  " + "; ".join(self.problems[:4])
        return f"{self.share:6.1%}" if self.share else f"frozen {self.reason}"


@dataclasses.dataclass(frozen=True)
class Demands:
    """What may be asked of a network (see `tests.networks.registry.Network`)."""

    ratio: float = 0.5
    fold_bn: bool = False
    ignore: tuple[str | nn.Module, ...] = ()
    statistics: bool = False
    temperature: bool = False
    larger: Any = None
    permuted_groups: int = 6
    prove: bool = False
    seed: int = 0
    output: str = "module"
    absent: bool = True


def examine(model: nn.Module, example: Any, demands: Demands) -> Outcome:
    """Prune `model` and report. Nothing raises but the caller's own mistakes; the model is left as it was."""
    outcome = Outcome()
    before = oracles.snapshot(model)
    try:
        _examine(model, example, demands, outcome)
    except TimeoutError:
        raise
    except Exception as error:  # every failure is a finding about this one network
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in frame.filename and Path(frame.filename).parent.name != "tests"
        ]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-2:]]
        place = f" ({' -> '.join(places)})" if places else ""
        lines = str(error).strip().splitlines() or [""]
        outcome.crash = f"{type(error).__name__}: {lines[0]}{place}"
    changed = oracles.differences(before, oracles.snapshot(model))
    if changed:
        outcome.problems.append("the original was changed: " + ", ".join(changed[:3]))
    return outcome


def _examine(model: nn.Module, example: Any, demands: Demands, outcome: Outcome) -> None:
    options: dict[str, Any] = {
        "fold_bn": demands.fold_bn, "seed": demands.seed, "ignore": demands.ignore, "output": demands.output
    }  # fmt: skip
    try:
        plan = graphprune.plan(model, example, demands.ratio, **options)
    except graphprune.GraphPruneError as error:
        if not str(error).startswith("output='graph': the model cannot become one graph"):
            raise
        outcome.reason = str(error)
        return
    removed = {name: axes for name, axes in plan.removed.items() if any(len(i) for i in axes.values())}
    pruned = graphprune.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).apply(model)
    if pruned is model:
        outcome.problems.append("apply() returned the model itself")
    if not removed:
        graph = graphprune.trace(model, example)
        names = [name for name, _ in model.named_parameters()]
        explained = [graph.explain(name) for name in names]
        silent = [name for name, text in zip(names, explained, strict=True) if not text.strip()]
        outcome.reason = _main_reason([str(reason) for axis in graph.frozen for reason in axis.reasons])
        if silent:
            outcome.problems.append(f"nothing was removed and nothing explains {silent[0]}")
        if names and not graph.frozen:
            outcome.problems.append("nothing was removed and nothing is said to be frozen")
    else:
        total = sum(p.numel() for p in model.parameters())
        outcome.share = 1 - sum(p.numel() for p in pruned.parameters()) / total
        if demands.fold_bn is False and outcome.share <= 0:
            outcome.problems.append("the plan removes channels but no parameter has gone")
    _same_outputs(model, pruned, removed, example, demands, outcome)
    if not demands.fold_bn:
        outcome.problems += oracles.parameters_match_plan(model, pruned, removed, demands.temperature)
    _same_flags(model, pruned, outcome)
    _permutations(model, example, demands, outcome)
    _backward(model, pruned, example, outcome)
    if demands.prove:
        report = graphprune.verify(model, pruned, plan, example)
        if not report.passed and not outcome.problems:
            outcome.problems.append(f"verify() finds a mismatch where there is none: {report}")


def _main_reason(reasons: list[str]) -> str:
    """The reason given most often, leaving aside what is true of every network."""
    everywhere = ("kernel positions", "reads the model's input", "part of the model's output", "is ignored")
    special = [reason for reason in reasons if not any(words in reason for words in everywhere)]
    counted = collections.Counter(special or reasons).most_common(1)
    return counted[0][0] if counted else "nothing to remove"


def _same_outputs(
    model: nn.Module, pruned: nn.Module, removed: oracles.Removed, example: Any, demands: Demands, outcome: Outcome
) -> None:
    computed = bool(oracles.make_permanent(oracles.copy_of(model)).weight_of)  # of lengths that are rounded
    tolerance = ROUNDED if demands.fold_bn or demands.temperature or computed else EXACT
    reference = None if demands.statistics else oracles.zero_reference(model, removed)
    exact = oracles.double_copy(pruned)
    for batch, label in ((example, ""), (demands.larger, " at another batch size")):
        if batch is None:
            continue
        actual = oracles.call(exact, oracles.double(batch))
        if reference is not None:
            error = oracles.relative_error(actual, oracles.call(reference, oracles.double(batch)))
            if not error <= tolerance:
                outcome.problems.append(f"differs from the zeroed model by {error:.1e}{label}")
        if not demands.absent:
            continue
        error = oracles.relative_error(actual, oracles.absent_output(model, removed, batch))
        if not error <= tolerance:
            outcome.problems.append(f"differs from the model without those channels by {error:.1e}{label}")


def _same_flags(model: nn.Module, pruned: nn.Module, outcome: Outcome) -> None:
    modes = {name: module.training for name, module in model.named_modules()}
    wrong = [name for name, module in pruned.named_modules() if module.training != modes.get(name, module.training)]
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    wrong += [name for name, p in pruned.named_parameters() if p.requires_grad != gradients.get(name, p.requires_grad)]
    if wrong:
        outcome.problems.append(f"training or requires_grad flags changed: {', '.join(wrong[:3])}")
    aliases = {id(p): name for name, p in pruned.named_parameters()}
    original = {id(p): name for name, p in model.named_parameters()}
    named, kept = oracles.named_tensors(model), oracles.named_tensors(pruned)
    for name, tensor in named.items():
        if name in kept and id(tensor) in original and aliases.get(id(kept[name])) != original[id(tensor)]:
            outcome.problems.append(f"{name} is no longer tied to {original[id(tensor)]}")


def _permutations(model: nn.Module, example: Any, demands: Demands, outcome: Outcome) -> None:
    # Only groups that the engine itself calls interchangeable: not those cut into blocks or read in their order.
    groups = [group for group in permutable(graphprune.trace(model, example)) if group.size > 1]
    rng = np.random.default_rng(demands.seed)
    if len(groups) > demands.permuted_groups:
        groups = [groups[i] for i in sorted(rng.choice(len(groups), demands.permuted_groups, replace=False))]
    for group in groups:
        error = oracles.permute_check(model, group.members, example, rng)
        if error is not None and not error <= EXACT:
            outcome.problems.append(f"permuting group {group.name!r} ({group.kind}) changes the output by {error:.1e}")


def _backward(model: nn.Module, pruned: nn.Module, example: Any, outcome: Outcome) -> None:
    wanted: Iterable[str] = _gradients(model, example, training=False)
    found = _gradients(pruned, example, training=False)
    names = {name for name, _ in pruned.named_parameters()}
    missing = sorted(name for name in wanted if name in names and name not in found)
    if missing:
        outcome.problems.append(f"no gradient reaches {', '.join(missing[:3])}")
    try:
        _gradients(model, example, training=True)
    except (RuntimeError, ValueError):
        return  # not made for training on such an example
    _gradients(pruned, example, training=True)


def _gradients(model: nn.Module, example: Any, training: bool) -> set[str]:
    """Names of the parameters that get a finite gradient from the sum of all outputs, on a copy of the model."""
    copied = oracles.copy_of(model).train(training)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [t for t in oracles.tensors_in(oracles.call(copied, example)) if t.requires_grad]
        if outputs:
            torch.stack([t.float().pow(2).mean() for t in outputs]).sum().backward()
    return {n for n, p in copied.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}


def examine_random(seed: int, ratio: float | None = None, **options: Any) -> Outcome:
    """The random network of that seed, at a ratio and with a choice of folding that follow from the seed too."""
    rng = np.random.default_rng([seed, 1])
    drawn, fold = float(rng.uniform(0.15, 0.75)), bool(rng.random() < 0.4)
    model, example = random_network(seed)
    demands = Demands(
        ratio=drawn if ratio is None else ratio,
        fold_bn=fold,
        statistics=model.statistics,
        temperature=model.temperature,
        larger=torch.cat([example, 0.7 * example[:1] + 0.1]),
        seed=seed,
        **options,
    )
    return examine(model, example, demands)


PRECISIONS = (torch.float32, torch.bfloat16, torch.float64)


def examine_program(seed: int, ratio: float | None = None, **options: Any) -> Outcome:
    """The random program of that seed, in a precision that follows from the seed as the ratio does; `verify` too must
    find it right. Complex numbers, scatters and the like are not in the reference of absent channels."""
    drawn = float(np.random.default_rng([seed, 3]).uniform(0.15, 0.75))
    model, example = random_program(seed, PRECISIONS[seed % len(PRECISIONS)])
    larger = torch.cat([example, 0.7 * example[:1] + 0.1])
    demands = Demands(drawn if ratio is None else ratio, absent=False, larger=larger, prove=True, seed=seed, **options)
    return examine(model, example, demands)
