"""`doctor`: what of a model can be pruned, what blocks the rest, and what each blocker costs."""

from __future__ import annotations

import dataclasses
import linecache
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from torch import nn

from ...dependency import DependencyGraph, Reason
from ...dependency.build import axis_roles
from ...dependency.graph import trace
from ...dependency.groups import Ints
from ...dependency.reparametrised import plain
from ...planning.request import Request
from ...planning.widths import plan_from_graph
from ...support.doors import door
from ...support.suggestions import check_choice
from ...support.tables import Column, render, table
from ...tracing.counting import at_batch_size
from ...tracing.example import ExampleInput
from ...tracing.pause import paused_collector
from .interfaces import Interface, interfaces_of
from .shares import Shares, free_elements
from .work import Axes, Work, work_of

_SORTS = ("parameters", "macs")


@dataclasses.dataclass(frozen=True)
class Blocker:
    """One reason why something cannot be removed, with everything it holds.

    `kind`: one word ("output", "input", "literal", "operator", "size"...); `reason`: a sentence; `source`: the line of
    the user's code ("net.py:12 in forward"), "" where there is none; `code`: that line. `modules`: paths of the modules
    that were running there. `axes`: held parameter axis -> number of indices held. `parameters`, `macs`: how many
    parameters and multiply-accumulates lie in the slices it holds. A slice that several blockers hold counts for each.
    """

    kind: str
    reason: str
    source: str
    code: str
    modules: tuple[str, ...]
    axes: Mapping[str, int]
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Prunable:
    """One group: `units` channels, heads... that can be removed one by one; `parameters` and `macs` lie in their
    slices. A parameter between two groups counts for both."""

    name: str
    kind: str
    units: int
    axes: tuple[str, ...]
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Doctor:
    """What `doctor` found; `print` it for people, `to_dict()` is plain data.

    `parameters`, `macs`: of the whole model; `macs` of one call on the example, whose `batch_size` is the length of the
    first axis of its first tensor (None without one). `prunable_parameters`,
    `prunable_macs`: those that go with some channel that can be removed. `prunable` and `blockers` are sorted, the
    dearest first. `others`: parameter axes that are no channels (tokens, pixels, vocabulary), with the reason.
    `ratio`: the fraction of channels that the blockers were looked for at. `interfaces`: methods that run a part of
    the model, such as `encode` and `decode`, and the layers to `ignore` where they are called on their own.
    """

    model: str
    parameters: int
    macs: int
    prunable_parameters: int
    prunable_macs: int
    prunable: tuple[Prunable, ...]
    blockers: tuple[Blocker, ...]
    others: Mapping[str, str]
    ratio: float
    interfaces: tuple[Interface, ...] = ()
    batch_size: int | None = None

    def table(self, limit: int | None = None) -> tuple[Table, Table]:
        """The groups and the blockers as `rich` tables, at most `limit` lines each."""
        costs = [Column("parameters", "parameters", ","), Column("MACs", "macs", ",")]
        groups = table(
            self.prunable[:limit],
            [*costs, Column("units", "units"), Column("kind", "kind", justify="left"),
             Column("named by", "name", justify="left")],
            title="Can be pruned" + _more(self.prunable, limit),
        )  # fmt: skip
        blockers = table(
            self.blockers[:limit],
            [*costs, Column("axes", lambda b: len(b.axes)),
             Column("why", "reason", justify="left", wrap=True), Column("where", _where, justify="left", wrap=True)],
            title="Cannot be removed" + _more(self.blockers, limit),
        )  # fmt: skip
        return groups, blockers

    def text(self, limit: int | None = None) -> str:
        """For people: totals and both tables, at most `limit` lines each."""
        head = (
            f"{self.model}: {_share(self.prunable_parameters, self.parameters)} of {self.parameters:,} parameters and "
            f"{_share(self.prunable_macs, self.macs)} of {self.macs:,} MACs of one call"
            f"{at_batch_size(self.batch_size)} lie on channels that can be removed"
        )
        tail = f"{len(self.others)} parameter axes are no channels: {', '.join(list(self.others)[:4])}"
        tail += ", ..." if len(self.others) > 4 else ""
        tables = [t for t, rows in zip(self.table(limit), (self.prunable, self.blockers), strict=True) if rows]
        return render(head, *tables, *([tail] if self.others else []), *map(_called_alone, self.interfaces))

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers, ready for JSON."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["prunable"] = [{**dataclasses.asdict(p), "axes": list(p.axes)} for p in self.prunable]
        data["blockers"] = [
            {**{f.name: getattr(b, f.name) for f in dataclasses.fields(b)}, "modules": list(b.modules),
             "axes": dict(b.axes)}
            for b in self.blockers
        ]  # fmt: skip
        data["others"] = dict(self.others)
        data["interfaces"] = [
            {"method": i.method, "modules": list(i.modules), "layers": list(i.layers)} for i in self.interfaces
        ]
        return data


def _called_alone(interface: Interface) -> str:
    return (
        f"{interface.method}() runs a part of the model: where it is called on its own, prune with "
        f"ignore={list(interface.layers)}"
    )


def _more(rows: tuple[Any, ...], limit: int | None) -> str:
    return f" (the first {limit} of {len(rows)})" if limit is not None and len(rows) > limit else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _where(blocker: Blocker) -> str:
    if not blocker.source:
        return ", ".join(path for path in blocker.modules[:3] if path)
    return f"{blocker.source}: {blocker.code}" if blocker.code else blocker.source


@door("model")
def doctor(model: nn.Module, example_input: Any, *, ratio: float = 0.5, sort: str = "parameters") -> Doctor:
    """Say what of `model` can be pruned, what cannot, why and at which line of your code, the dearest blockers first.

    The model runs once (eval mode, no gradients, left as it was). Then a pruning of `ratio` of all channels is planned,
    because some blockers show only when sizes change: `C // heads` with C kept and heads cut. Weights are not looked
    at. `sort`: "parameters" or "macs", by which the lists are sorted. Kernel positions and axes of length 1 are not
    listed.

    >>> import torch, graphprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> found = graphprune.doctor(net, torch.randn(2, 3))
    >>> [(p.name, p.units, p.parameters) for p in found.prunable]
    [('0.weight[0]', 8, 64)]
    >>> [(b.reason, b.parameters, b.macs) for b in found.blockers]
    [("part of the model's output", 36, 64), ("reads the model's input", 24, 48)]

    Raises GraphPruneError for arguments out of range and when the model fails on the example input.
    """
    check_choice("sort", sort, _SORTS)
    request = Request(ratio, criterion="random", round_to=1)
    with paused_collector():
        model, example = plain(model), ExampleInput.of(example_input)
        graph, _ = plan_from_graph(model, trace(model, example), request)
        return dataclasses.replace(examine(model, graph, float(ratio), sort), batch_size=example.batch_size)


def examine(model: nn.Module, graph: DependencyGraph, ratio: float, sort: str) -> Doctor:
    """`doctor` for a graph that planning has narrowed."""
    parameters = _parameters(model, graph)
    unused = {n: p for n, p in parameters.items() if n not in graph.trace.parameters}
    blocks = {n: _axes_of(graph, n) for n in parameters if n not in unused}
    work = list(work_of(graph))
    sizes = {n: parameters[n].numel() for n in blocks}
    analysis = graph.analysis

    def key(item: Blocker | Prunable) -> tuple[Any, ...]:
        return (-getattr(item, sort), -item.macs - item.parameters, str(item))

    return Doctor(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in parameters.values()),
        macs=sum(part.macs for part in work),
        prunable_parameters=sum(free_elements(analysis, axes, sizes[n]) for n, axes in blocks.items()),
        prunable_macs=sum(free_elements(analysis, part.axes, part.macs) for part in work),
        prunable=tuple(sorted(_prunable(graph, blocks, sizes, work), key=key)),
        blockers=tuple(sorted([*_blockers(graph, blocks, sizes, work), *_unused(unused)], key=key)),
        others=_others(graph),
        ratio=ratio,
        interfaces=interfaces_of(model, graph),
    )


def _parameters(model: nn.Module, graph: DependencyGraph) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first name."""
    return {graph.trace.canonical(n): p for n, p in model.named_parameters()}


def _axes_of(graph: DependencyGraph, name: str) -> Axes:
    shape = graph.trace.parameters[name].meta["val"].shape
    roots = graph.analysis.dims.roots
    return [(n, roots[(name, a)]) for a, n in enumerate(shape) if (name, a) in roots]


def _totals(
    shares: Shares, blocks: Mapping[str, Axes], sizes: Mapping[str, int], work: list[Work]
) -> tuple[Ints, Ints]:
    """Parameters and MACs in the slices of each holder."""
    nothing = np.zeros(shares.holders, np.int64)
    held = sum((np.asarray(shares.elements(axes, sizes[n]), np.int64) for n, axes in blocks.items()), nothing)
    busy = sum((np.asarray(shares.elements(part.axes, part.macs), np.int64) for part in work), nothing)
    return held, busy


def _prunable(
    graph: DependencyGraph, blocks: Mapping[str, Axes], sizes: Mapping[str, int], work: list[Work]
) -> list[Prunable]:
    # components that hold no frozen position have the same number with and without freezing
    shares = Shares(graph.analysis, [graph.units(g) for g in graph.groups], frozen=False)
    held, busy = _totals(shares, blocks, sizes, work)
    return [
        Prunable(
            g.name,
            g.kind,
            g.size,
            tuple(dict.fromkeys(f"{m.parameter}[{m.axis}]" for m in g.members)),
            int(held[i]),
            int(busy[i]),
        )
        for i, g in enumerate(graph.groups)
    ]


def _blockers(
    graph: DependencyGraph, blocks: Mapping[str, Axes], sizes: Mapping[str, int], work: list[Work]
) -> list[Blocker]:
    analysis = graph.analysis
    assert analysis.tied is not None
    channel = _channels(graph)
    merged: dict[tuple[str, str, str], list[tuple[Ints, Reason]]] = {}
    for every, reason in analysis.freezes:
        positions = every[channel[analysis.tied[every]]]
        if reason.kind != "kernel" and len(positions):
            merged.setdefault((reason.kind, reason.text, str(reason.source or "")), []).append((positions, reason))
    labels = [
        np.unique(analysis.tied[np.concatenate([positions for positions, _ in found])]) for found in merged.values()
    ]
    shares = Shares(analysis, labels, frozen=True)
    held, busy = _totals(shares, blocks, sizes, work)
    axes: list[dict[str, int]] = [{} for _ in labels]
    for (name, axis), axis_map in analysis.dims.roots.items():
        length = graph.trace.parameters[name].meta["val"].shape[axis]
        counts = shares.on_axis(axis_map, length)
        for index in np.nonzero(counts)[0].tolist():
            axes[index][f"{name}[{axis}]"] = int(counts[index])
    out = []
    for index, ((kind, text, source), found) in enumerate(merged.items()):
        if axes[index]:
            first = found[0][1].source
            code = linecache.getline(first.file, first.line).strip() if first else ""
            modules = dict.fromkeys(r.node.meta.get("module") or "" for _, r in found if r.node is not None)
            out.append(
                Blocker(kind, text, source, code, tuple(modules), axes[index], int(held[index]), int(busy[index]))
            )
    return out


def _channels(graph: DependencyGraph) -> npt.NDArray[np.bool_]:
    """Which components some layer produces or reads as channels."""
    analysis = graph.analysis
    return analysis.ties_of(
        analysis.dims.positions(dim)
        for root, role in axis_roles(analysis).items()
        if role in ("out", "in")
        for dim in analysis.dims.roots.get(root, ())
    )


def _others(graph: DependencyGraph) -> dict[str, str]:
    """Axes of parameters with indices that nothing can remove and that are no channels."""
    analysis = graph.analysis
    assert analysis.tied is not None
    channel = _channels(graph)
    out = {}
    for frozen in graph.frozen:
        axis_map = analysis.dims.roots.get((frozen.parameter, frozen.axis))
        if axis_map is not None:
            positions = np.concatenate([analysis.dims.positions(d) for d in axis_map])
            if not channel[analysis.tied[positions]].any():
                out[f"{frozen.parameter}[{frozen.axis}]"] = "; ".join(map(str, frozen.reasons))
    return out


def _unused(unused: Mapping[str, nn.Parameter]) -> list[Blocker]:
    if not unused:
        return []
    axes = {f"{n}[{a}]": length for n, p in unused.items() for a, length in enumerate(p.shape) if length > 1}
    modules = tuple(dict.fromkeys(n.rpartition(".")[0] for n in unused))
    total = sum(math.prod(p.shape) for p in unused.values())
    return [Blocker("unused", "not used when the example input ran", "", "", modules, axes, total, 0)]
