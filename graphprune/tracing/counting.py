"""Parameters and multiply-accumulates of a network, counted on the recorded run: what it really computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from torch import nn

from ..support.doors import door
from ..support.tables import Column, render, table
from .example import ExampleInput
from .trace import record_run
from .work import macs_of, not_counted, qualified_name


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """One module, without the modules inside it.

    `kind`: the name of its class. `parameters`: elements of the parameters it holds itself; a shared parameter counts
    where it is first found. `macs`: of the operators called while it was the innermost running module, over all calls.
    """

    kind: str
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Count:
    """What `count` found.

    `parameters`: elements of all parameters, each counted once however often it is used; buffers are not parameters.
    `macs`: multiply-accumulates of one forward pass over the whole example, not per sample. `batch_size`: length of
    the first axis of the example's first tensor, None without one. `per_layer`: module path ("" is the model itself)
    -> LayerCount, for every module that holds parameters or does arithmetic; the entries add up to the totals.
    `uncounted`: operators of the run that do such arithmetic in a way that is not counted -> number of calls.
    """

    parameters: int
    macs: int
    batch_size: int | None
    per_layer: Mapping[str, LayerCount]
    uncounted: Mapping[str, int]

    @property
    def macs_per_sample(self) -> float | None:
        """`macs / batch_size`: right where the first axis of the first input is the batch."""
        return self.macs / self.batch_size if self.batch_size else None

    def table(self) -> Table:
        """One line per layer and the totals, as a `rich` table."""
        rows: list[tuple[str, str, int, int]] = [
            (path or "(the model itself)", layer.kind, layer.parameters, layer.macs)
            for path, layer in self.per_layer.items()
        ]
        rows.append(("total", "", self.parameters, self.macs))
        columns = [
            Column("layer", 0, justify="left"),
            Column("kind", 1, justify="left"),
            Column("parameters", 2, ","),
            Column("MACs", 3, ","),
        ]
        result = table(rows, columns)
        if self.per_layer:
            result.rows[-2].end_section = True
        return result

    def __str__(self) -> str:
        lines = []
        if self.batch_size is not None:
            lines.append(f"MACs of one forward pass{at_batch_size(self.batch_size)}")
        if self.uncounted:
            lines.append("not counted: " + ", ".join(f"{name} ({calls})" for name, calls in self.uncounted.items()))
        return render(self.table(), *lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and numbers, ready for JSON."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "batch_size": self.batch_size,
            "macs_per_sample": self.macs_per_sample,
            "per_layer": {path: dataclasses.asdict(layer) for path, layer in self.per_layer.items()},
            "uncounted": dict(self.uncounted),
        }


def at_batch_size(size: int | None) -> str:
    """What MACs are of, to stand behind "one call"; empty where the size of the batch is unknown."""
    return "" if size is None else f" at batch size {size}"


@door("model")
def count(model: nn.Module, example_input: Any) -> Count:
    """Parameters and multiply-accumulates (MACs) of `model`, in all and per layer.

    The model runs once on the example (eval mode, no gradients, left as it was) and what it computed is counted, at
    the example's batch size: layers, functional calls, matrix products with broadcasting, both products of attention,
    einsum, bilinear forms, recurrent layers. A layer that is called twice counts twice, one that is not called counts
    nothing. FLOPs are about twice the MACs.

    Counted are sums of products: convolutions count every kernel position, the padded ones too, and attention the
    whole score matrix, a causal or masked one too. Elementwise arithmetic, biases, norms, activations, pooling and
    interpolation count zero, as is usual. Operators that are known to do more (Fourier transforms, sparse products,
    solvers, other libraries' kernels) are listed in `uncounted`.

    `example_input`: a tensor, a tuple of positional arguments or a dict of keyword arguments. Works on any device;
    on "meta" nothing is computed.

    >>> import torch, graphprune
    >>> found = graphprune.count(torch.nn.Linear(3, 4), torch.randn(2, 3))
    >>> found.parameters, found.macs, found.macs_per_sample
    (16, 24, 12.0)

    Raises GraphPruneError when the model fails on the example input, or has parameters without a shape (lazy modules
    that never ran).
    """
    example = ExampleInput.of(example_input)
    trace = record_run(model, example)
    macs: dict[str, int] = {}
    uncounted: dict[str, int] = {}
    for node in trace.graph.nodes:
        if node.op != "call_function":
            continue
        work = macs_of(node)
        if work is not None:
            path = node.meta.get("module") or ""
            macs[path] = macs.get(path, 0) + work
        elif not_counted(node):
            name = qualified_name(node)
            uncounted[name] = uncounted.get(name, 0) + 1
    layers: dict[str, LayerCount] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                held += parameter.numel()
        if held or macs.get(path):
            layers[path] = LayerCount(type(module).__name__, held, macs.get(path, 0))
    return Count(
        parameters=sum(layer.parameters for layer in layers.values()),
        macs=sum(macs.values()),
        batch_size=example.batch_size,
        per_layer=layers,
        uncounted=uncounted,
    )
