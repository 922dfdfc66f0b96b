"""A network that was repaired or trained, beside the one that its plan makes: what else may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import GraphPruneError
from ...support.comparing import Difference
from ...support.walking import all_modules
from ...tracing.example import ExampleInput
from ...tracing.operators import products_of
from ...tracing.trace import Trace, record_run
from ..plan import Plan
from ..surgery import find_folds, fold_names
from .results import Check
from .running import does_not_run, run, same_shapes
from .state import Allowed, checked_state

TRAINED = "training"
_MEAN, _STATISTICS = "running_mean", ("running_mean", "running_var")
_NORM = ("weight", "bias", *_STATISTICS)


def checks_of_repaired(
    pruned: nn.Module, cut: nn.Module, plan: Plan, repair: str, example: ExampleInput
) -> list[Check]:
    """Two checks: the network runs, and holds what `cut` does, but for what the method of repair may change; with
    `repair=TRAINED` but for the values of tensors, modes, and what a run in training mode changes."""
    name = "trained" if repair == TRAINED else "repaired"
    trained = repair == TRAINED
    allowed, by = (_of_training, repair) if trained else (_of_repair(cut, plan, repair, example), f"recover={repair!r}")
    state, _ = checked_state(pruned, cut, example, allowed, trained)
    try:
        outputs = run(cut, example, "verify (cut)"), run(pruned, example, f"verify ({name})")
        forward = dataclasses.replace(same_shapes(outputs[1], outputs[0]), name=f"forward, {name}")
    except GraphPruneError as error:
        if state.passed:
            raise
        forward = does_not_run(f"forward, {name}", error)
    told = f"{by} changed it after it was cut; the other checks are of what the plan makes"
    return [forward, dataclasses.replace(state, name=name, detail=told if state.passed else state.detail)]


def _of_training(difference: Difference) -> bool:
    return difference.values


def _of_repair(cut: nn.Module, plan: Plan, repair: str, example: ExampleInput) -> Allowed:
    """What `recover` with this method may have changed in `cut`."""
    trace = record_run(cut, example)
    norms = {name for name, module in all_modules(cut).items() if isinstance(module, _BatchNorm)}
    changed = _METHODS[repair](trace, norms, plan)
    if repair == "blocks":
        changed |= {trace.canonical(name) for name, _ in cut.named_parameters(remove_duplicate=False)}
    if repair != "batchnorm" and norms and not plan.folds:  # repaired as if they were folded, and taken apart again
        for fold in find_folds(cut, trace):
            changed |= {*fold_names(fold), *(f"{fold.batch_norm}.{kind}" for kind in _NORM)}

    def allowed(difference: Difference) -> bool:
        given = difference.added and difference.owner is not None and difference.where.rpartition(".")[2] == "bias"
        if given and repair != "batchnorm":
            return True  # given to a layer that had none
        return difference.values and trace.canonical(difference.where) in changed

    return allowed


def _of_mean(trace: Trace, norms: set[str], plan: Plan) -> set[str]:
    """What layers add to all their results, or the batch norms behind take from them."""
    return _multiplied(trace)[1] | {f"{name}.{_MEAN}" for name in norms}


def _of_batchnorm(trace: Trace, norms: set[str], plan: Plan) -> set[str]:
    """Statistics, and where they are folded, what they are folded into. Where layers are left out, names have moved."""
    statistics = {f"{name}.{kind}" for name in norms for kind in _STATISTICS}
    if plan.folds and plan.layers:
        weights, biases = _multiplied(trace)
        return weights | biases | statistics
    return statistics | {trace.canonical(name) for fold in plan.folds for name in fold_names(fold)}


def _of_moments(trace: Trace, norms: set[str], plan: Plan) -> set[str]:
    return _of_mean(trace, norms, plan) | _of_batchnorm(trace, norms, plan)


def _of_least_squares(trace: Trace, norms: set[str], plan: Plan) -> set[str]:
    """All that is multiplied with data, and the batch norms that a fit is taken apart into."""
    weights, biases = _multiplied(trace)
    return weights | biases | {f"{name}.{kind}" for name in norms for kind in _NORM}


_METHODS: dict[str, Callable[[Trace, set[str], Plan], set[str]]] = {
    "mean": _of_mean,
    "moments": _of_moments,
    "batchnorm": _of_batchnorm,
    "least_squares": _of_least_squares,
    "blocks": _of_least_squares,  # and all other parameters
}


def _multiplied(trace: Trace) -> tuple[set[str], set[str]]:
    """The parameters that are multiplied with data, and those that are added to the products."""
    names = {node: name for name, node in trace.parameters.items()}
    products = [p for node in trace.graph.nodes if node.op == "call_function" for p in products_of(node)]
    weights = {names[p.weight] for p in products if p.weight in names}
    return weights, {names[p.bias] for p in products if isinstance(p.bias, fx.Node) and p.bias in names}
