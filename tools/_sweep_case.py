"""One network of the sweep, in a process of its own: prints a line of JSON for every ratio.

    python -m tools._sweep_case ours resnet18 0.3 0.5
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.dependency import DependencyGraph
from graphprune.planning.request import Request
from graphprune.planning.widths import plan_from_graph
from graphprune.tracing.example import ExampleInput, flatten_tensors
from tools._common import build, enliven, example_for, parameters_in, relative_difference
from tools._peer import examine as examine_peer
from tools._peer import first_line


def removed_parameters(model: nn.Module, removed: Mapping[str, Mapping[int, tuple[int, ...]]]) -> int:
    """Parameters that the plan's cuts take away; what folding batch norms saves is not counted."""
    count = 0
    for name, parameter in model.named_parameters():
        axes = removed.get(name, {})
        left = math.prod(length - len(axes.get(axis, ())) for axis, length in enumerate(parameter.shape))
        count += parameter.numel() - left
    return count


def frozen_share(model: nn.Module, graph: DependencyGraph) -> float:
    """Share of the indices of parameter axes, kernel positions aside, that cannot be removed."""
    used = {name: p.shape for name, p in model.named_parameters() if name in graph.trace.parameters}
    frozen = {(f.parameter, f.axis): f for f in graph.frozen}
    total = stuck = 0
    for name, shape in used.items():
        for axis, length in enumerate(shape):
            found = frozen.get((name, axis))
            if length > 1 and not (found and {r.kind for r in found.reasons} == {"kernel"}):
                total += length
                stuck += found.count if found else 0
    return stuck / max(total, 1)


def run_backward(model: nn.Module, batch: Any) -> str | None:
    """Forward and backward; what is wrong with the gradients, or None."""
    example = ExampleInput.of(batch)
    outputs = [t for t in flatten_tensors(example.call(model)) if t.requires_grad and t.numel()]
    torch.stack([t.square().mean() for t in outputs]).sum().backward()
    used = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if not used:
        return "no parameter gets a gradient"
    if not any(t.is_meta for t in example.tensors()):
        for name, gradient in used:
            if not gradient.isfinite().all():
                return f"the gradient of {name} is not finite"
    model.zero_grad(set_to_none=True)
    return None


def attempt(model: nn.Module, batch: Any) -> str | None:
    """`run_backward`, with an exception as its first line."""
    try:
        return run_backward(model, batch)
    except Exception as error:
        return first_line(error)


def examine_ours(model: nn.Module, example: Tensor, batch: Tensor, ratio: float) -> dict[str, Any]:
    """Prune, prove, run forward and backward; everything that goes wrong becomes part of the result."""
    found: dict[str, Any] = {"parameters": parameters_in(model)}
    try:
        started = time.perf_counter()
        graph = graphprune.trace(model, example)
        graph, plan = plan_from_graph(model, graph, Request(ratio, criterion="l2", round_to=1))
        planned = time.perf_counter()
        small = plan.apply(model)
        found["seconds"] = [planned - started, time.perf_counter() - planned]
        found["removed"] = removed_parameters(model, plan.removed)
        found["left"] = parameters_in(small)
        found["frozen"] = frozen_share(model, graph)
        report = graphprune.verify(model, small, plan, example, graph=graph)
        errors = [None if math.isnan(c.error) else c.error for c in report.checks]
        found["checks"] = [[c.name, c.passed, e, c.detail] for c, e in zip(report.checks, errors, strict=True)]
        found["macs"] = [graphprune.count(m, example).macs for m in (model, small)]
        if not example.is_meta:
            with torch.no_grad():  # a cut that changed nothing at all would be no proof
                found["effect"] = relative_difference(small(example), model(example))
        found["backward"] = attempt(small.eval(), batch)
        found["training"] = attempt(small.train(), batch)
    except Exception as error:
        found["failure"] = first_line(error)
        found["traceback"] = traceback.format_exc()[-3000:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tool", choices=("ours", "peer"))
    parser.add_argument("name")
    parser.add_argument("ratios", type=float, nargs="+")
    parser.add_argument("--meta", action="store_true", help="on the meta device: shapes only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "meta" if options.meta else "cpu"
    torch.manual_seed(0)
    model, example = build(options.name, device), example_for(options.name, 1, device)
    batch = example_for(options.name, 2, device, seed=1)
    if not options.meta:
        enliven(model, batch)
    for ratio in options.ratios:
        if options.tool == "ours":
            found = examine_ours(model, example, batch, ratio)
        else:
            found = examine_peer(model, example, ratio)
        print(json.dumps({"ratio": ratio, "meta": options.meta, **found}), flush=True)


if __name__ == "__main__":
    main()
