"""One model of the coverage sweep: prune, prove, train one step, export; everything that goes wrong is a result."""

from __future__ import annotations

import copy
import math
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.dependency import DependencyGraph
from graphprune.errors import GraphPruneError
from graphprune.planning.request import Request
from graphprune.planning.widths import plan_from_graph
from graphprune.plans.verification.results import relative_error
from graphprune.tracing.example import ExampleInput
from tools import _peer
from tools._common import enliven, parameters_in
from tools._sweep_case import attempt, frozen_share, removed_parameters

RATIO = 0.5


def main_reason(model: nn.Module, graph: DependencyGraph) -> str:
    """The reason that holds most of the indices that `frozen_share` counts, and the first line where it does."""
    held: Counter[str] = Counter()
    lines: dict[str, str] = {}
    parameters = {name for name, _ in model.named_parameters()}
    for frozen in graph.frozen:
        if frozen.parameter in parameters and frozen.reasons and {r.kind for r in frozen.reasons} != {"kernel"}:
            first = next((r for r in frozen.reasons if r.kind == "output"), frozen.reasons[0])
            held[first.text] += frozen.count
            lines.setdefault(first.text, str(first))
    return lines[held.most_common(1)[0][0]][:160] if held else ""


def outputs_of(model: nn.Module, graph: DependencyGraph) -> list[str]:
    """Modules that make the model's output: what everyone has to tell Torch-Pruning to leave alone.

    Of a head that shares its weight with an embedding, the head.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.Embedding):
                owners.setdefault(id(parameter), []).append(path)
    parameters = dict(model.named_parameters())
    found = []
    for frozen in graph.frozen:
        if frozen.axis == 0 and any(r.kind == "output" for r in frozen.reasons):
            found += owners.get(id(parameters.get(frozen.parameter)), [])
    return list(dict.fromkeys(found))


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:])


def ours(
    build: Callable[[], tuple[nn.Module, Any]], onnx: str, only_eval: bool = False, heads: bool = False
) -> dict[str, Any]:
    """Everything asked of one model. `failure` is there when it ended early, `stage` says where."""
    found: dict[str, Any] = {"stage": "build"}
    try:
        model, example = _living(build)
        found["parameters"] = parameters_in(model)
        _prune_and_prove(model, example, onnx, only_eval, found)
        if heads:
            found["stage"] = "heads"
            found["heads"] = _heads_alone(model, example)
        found["stage"] = "done"
    except Exception as error:
        found["failure"] = _peer.first_line(error)
        found["raw"] = not isinstance(error, GraphPruneError) and found["stage"] != "build"
        found["where"] = _where(error)
        found["traceback"] = traceback.format_exc()[-6000:]
    return found


def without_cache(model: nn.Module) -> None:
    """Tell a Hugging Face model to return no keys and values for the next step."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False


def _living(build: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, example = build()
    enliven(model.eval(), example)
    return model, example


def _prune_and_prove(model: nn.Module, example: Any, onnx: str, only_eval: bool, found: dict[str, Any]) -> None:
    found["stage"] = "trace"
    started = time.perf_counter()
    graph = graphprune.trace(model, example)
    traced = time.perf_counter()
    found["stage"] = "plan"
    graph, plan = plan_from_graph(model, graph, Request(RATIO, criterion="l2", round_to=1))
    found["seconds"] = [traced - started, time.perf_counter() - traced]
    found["frozen"] = frozen_share(model, graph)
    found["reason"] = main_reason(model, graph)
    kinds: dict[str, list[int]] = {}
    for group in plan.groups:
        kinds.setdefault(group.kind, [0, 0])
        kinds[group.kind][0] += group.size
        kinds[group.kind][1] += group.kept
    found["kinds"] = kinds
    found["stage"] = "cut"
    small = plan.apply(model)
    found["removed"] = removed_parameters(model, plan.removed)
    found["left"] = parameters_in(small)
    found["stage"] = "verify"
    report = graphprune.verify(model, small, plan, example, graph=graph)
    found["checks"] = _checks(report)
    found["stage"] = "count"
    found["macs"] = [graphprune.count(m, example).macs for m in (model, small)]
    with torch.no_grad():  # a cut that changed nothing at all would be no proof
        arguments = ExampleInput.of(example)
        found["effect"] = relative_error(arguments.clone().call(small), arguments.clone().call(model))
    found["stage"] = "train"
    found["backward"] = attempt(small.eval(), example)
    if not only_eval:
        found["training"] = attempt(small.train(), example)
    if onnx:
        found["stage"] = "export"
        without_cache(small)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "small.onnx"
            written = graphprune.export_onnx(small.eval(), example, target, dynamic_batch=onnx == "free")
            found["onnx"] = written.max_relative_error


def _heads_alone(model: nn.Module, example: Any) -> list[Any]:
    """Half of the attention heads and nothing else: how many there are, how many go, and the checks as in `ours`."""
    graph = graphprune.trace(model, example)
    if not any(group.kind == "head" for group in graph.groups):
        return [0, 0, []]
    request = Request(RATIO, criterion="l2", round_to=1, granularity="heads", fold_bn=False)
    graph, plan = plan_from_graph(model, graph, request)
    heads = [group for group in plan.groups if group.kind == "head"]
    removed = sum(group.size - group.kept for group in heads)
    report = graphprune.verify(model, plan.apply(model), plan, example, graph=graph)
    return [sum(group.size for group in heads), removed, _checks(report)]


def _checks(report: Any) -> list[list[Any]]:
    """Name, outcome, relative error (None where there is none) and detail of each proof."""
    return [[c.name, c.passed, None if math.isnan(c.error) else c.error, c.detail] for c in report.checks]


def peer(build: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    """The same model through Torch-Pruning, told which modules make the output."""
    try:
        model, example = _living(build)
        without_cache(model)  # the library follows tensors, and knows no caches
        ignored = outputs_of(model, graphprune.trace(copy.deepcopy(model), example))
    except Exception as error:
        return {"failure": _peer.first_line(error), "stage": "build"}
    return _peer.examine(model, example, RATIO, ignored)
