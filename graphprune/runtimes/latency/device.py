"""The latency table of the machine this runs on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...dependency import trace
from ...dependency.reparametrised import plain
from ...errors import GraphPruneError
from ...plans.structure import structural_hash
from ...support.doors import door
from ...support.progress import ProgressOption, reported, stage
from .forecast import Forecast, measured_context
from .table import LatencyTable
from .target import Target, keep, own_table, rig_of


@door("model")
@reported("latency table")
def latency_table(
    model: nn.Module, example_input: Any, target: Target | None = None, *, progress: ProgressOption = None
) -> LatencyTable:
    """The latency table of this machine for `model`: everything that planning with a latency budget looks up.

    Runs the model's computations alone at five widths each in the target's runtime, looks for the widths that the
    machine likes and profiles the whole dense network once. Takes a few seconds to a few minutes; times are kept in the
    user's cache directory (GRAPHPRUNE_CACHE, XDG_CACHE_HOME or ~/.cache), by machine, runtime, precision, provider,
    threads and version of the runtime.

    `table.save(path)` writes a JSON file that `Target(table=path)` takes on another machine. `progress`: as in
    `graphprune.plan`.

    Raises GraphPruneError for a model that cannot be exported and a provider that does not load.
    """
    chosen = Target.of(target)
    if chosen.table is not None:
        raise GraphPruneError("latency_table: target must not have a table already")
    model = plain(model)
    graph = trace(model, example_input)
    with rig_of(chosen) as rig:
        table = own_table(rig)
        with stage("the whole network"), rig.bench(model, example_input) as bench:
            context = measured_context(graph, table, bench.profile())
        with stage("computations"):
            Forecast(table, context).cost(graph)
        keep(table)
    table.contexts[structural_hash(model)] = context
    return table
