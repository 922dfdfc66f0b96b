"""What a benchmark found, as data, table, JSON and plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import GraphPruneError
from ..support.files import replacing
from ..support.plots import grouped_bars
from ..support.tables import Column, render, table
from ..support.types import PathLike
from .statistics import speedup_interval, spread

# The clock of a row whose fastest samples stand for all.
FASTEST = "wall, fastest"


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One model at one batch size.

    Times are milliseconds for one call with the whole batch; each of `samples_ms` (one per round) is the mean over
    `calls` calls in a row, and `median_ms`, `p10_ms` and `p90_ms` are over these samples. `speedup` is
    median(baseline) / median(this), from `speedup_low` to `speedup_high` with 95 % confidence (paired bootstrap over
    rounds; all three 1 for the baseline itself). `nodes`: how many nodes of ONNX Runtime's optimised graph run on
    which provider. `parameters`: of the module, or elements of the floating-point initializers of a file.
    `file_mib`: size of its files. `max_relative_error`: the runtime on the CPU against torch, None if not checked.

    `runtime`, `precision`: where it ran; speed-ups are against the baseline there. `in_force`: the precision in the
    runtime's own words. `clock`: what was read, "wall", "cpu" or "wall, fastest" (then `median_ms` is the fastest
    sample); see `graphprune.benchmark`.
    """

    model: str
    batch_size: int | None
    median_ms: float
    p10_ms: float
    p90_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    calls: int
    nodes: Mapping[str, int]
    parameters: int | None
    file_mib: float
    max_relative_error: float | None
    samples_ms: tuple[float, ...]
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    in_force: str = ""
    clock: str = "wall"

    @property
    def items_per_second(self) -> float:
        """Throughput at the median: batch size / time."""
        return 1000 * (self.batch_size or 1) / self.median_ms

    def share_on(self, provider: str) -> float:
        """Share of the nodes that run on `provider`, from 0 to 1."""
        return self.nodes.get(provider, 0) / max(1, sum(self.nodes.values()))


def row_of(
    samples: Sequence[float], baseline: Sequence[float], *, seed: int, clock: str = "wall", **facts: Any
) -> BenchmarkRow:
    """The row of a model whose samples, and those of the baseline, are in seconds; `facts`: its other fields."""
    fastest = clock == FASTEST
    median, p10, p90 = spread(samples)
    ratio, low, high = speedup_interval(baseline, samples, fastest=fastest, seed=seed)
    return BenchmarkRow(
        median_ms=1000 * (min(samples) if fastest else median),
        p10_ms=1000 * p10,
        p90_ms=1000 * p90,
        speedup=ratio,
        speedup_low=low,
        speedup_high=high,
        samples_ms=tuple(1000 * sample for sample in samples),
        clock=clock,
        **facts,
    )


@dataclasses.dataclass(frozen=True)
class BenchmarkReport:
    """Rows (batch size by batch size, models in the order given) and the circumstances of the measurement.

    `notes` say what a reader must know: how the provider was chosen, nodes that ran elsewhere, files with a fixed
    batch, more threads than cores.
    """

    rows: tuple[BenchmarkRow, ...]
    baseline: str
    provider: str
    provider_options: Mapping[str, str]
    threads: int
    cuda_graph: bool
    warmup: int
    rounds: int
    min_time: float
    seed: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    def row(
        self, model: str, batch_size: int | None = None, runtime: str | None = None, precision: str | None = None
    ) -> BenchmarkRow:
        """The row of `model` at `batch_size`, in that runtime and precision; the first that fits what is given.

        Raises:
            GraphPruneError: there is no such row.
        """
        wanted = (batch_size, runtime, precision)
        for row in self.rows:
            own = (row.batch_size, row.runtime, row.precision)
            if row.model == model and all(ask in (None, has) for ask, has in zip(wanted, own, strict=True)):
                return row
        known = sorted({(row.model, row.batch_size) for row in self.rows}, key=str)
        where = "".join(f", {value}" for value in (runtime, precision) if value is not None)
        raise GraphPruneError(f"no row for model {model!r} at batch size {batch_size}{where}; there are {known}")

    @property
    def several(self) -> bool:
        """Whether there is more than ONNX Runtime in float32."""
        return any((row.runtime, row.precision) != ("onnxruntime", "fp32") for row in self.rows)

    def table(self) -> Table:
        """The rows as a `rich` table."""
        places = [Column("runtime", "runtime", justify="left"), Column("precision", "precision", justify="left")]
        columns = [
            *(places if self.several else []),
            Column("model", "model", justify="left"),
            Column("batch", "batch_size"),
            Column("median ms", "median_ms", ".3f"),
            Column("p10", "p10_ms", ".3f"),
            Column("p90", "p90_ms", ".3f"),
            Column("items/s", lambda row: row.items_per_second, ".1f"),
            Column("speed-up", lambda row: row, self._speedup),
            Column("parameters", "parameters", ","),
            Column("MiB", "file_mib", ".2f"),
            *([Column("nodes", lambda row: row, self._nodes)] if any(row.nodes for row in self.rows) else []),
            Column("rel. error", "max_relative_error", ".1e"),
        ]
        where = "Latency" if self.several else "Latency in ONNX Runtime"
        return table(self.rows, columns, title=f"{where}, speed-up against {self.baseline!r} (95 %)")

    def circumstances(self) -> list[str]:
        """Machine, versions, settings and notes, one line each."""
        machine, versions = self.machine, self.versions
        gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
        options = "".join(f", {key}={value}" for key, value in self.provider_options.items())
        return [
            f"{self.provider}{options}, {self.threads} thread{'s' if self.threads != 1 else ''}, "
            f"{self.rounds} rounds of at least {1000 * self.min_time:g} ms after {self.warmup} warm-up calls"
            f"{', CUDA graphs' if self.cuda_graph else ''}, seed {self.seed}",
            f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores usable{gpu}, {machine['system']}",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            *(f"note: {note}" for note in self.notes),
        ]

    def __str__(self) -> str:
        return render(self.table(), *self.circumstances())

    def to_dict(self) -> dict[str, Any]:
        """Everything, samples included, as plain dicts, lists, strings and numbers."""
        result = dataclasses.asdict(self)
        for entry, row in zip(result["rows"], self.rows, strict=True):
            entry["nodes"] = dict(row.nodes)
            entry["samples_ms"] = list(row.samples_ms)
            entry["items_per_second"] = row.items_per_second
        for name in ("machine", "versions", "provider_options"):
            result[name] = dict(getattr(self, name))
        return {**result, "rows": list(result["rows"]), "notes": list(self.notes)}

    def to_json(self, path: PathLike) -> Path:
        """Write `to_dict()` as a JSON file.

        Raises:
            GraphPruneError: the path cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)

    def plot(self, path: PathLike) -> Path:
        """A bar chart of the medians with whiskers from p10 to p90 and the speed-up above; needs matplotlib.

        Raises:
            GraphPruneError: matplotlib is missing or the path cannot be written.
        """
        groups = list(dict.fromkeys((row.batch_size, row.runtime, row.precision) for row in self.rows))
        names = list(dict.fromkeys(row.model for row in self.rows))
        cells = {name: [self.row(name, *group) for group in groups] for name in names}
        return grouped_bars(
            path,
            [self._group(*group) for group in groups],
            {name: [row.median_ms for row in rows] for name, rows in cells.items()},
            lower={name: [row.p10_ms for row in rows] for name, rows in cells.items()},
            upper={name: [row.p90_ms for row in rows] for name, rows in cells.items()},
            labels={name: [f"{row.speedup:.2f}×" for row in rows] for name, rows in cells.items()},
            title=f"{self.provider}, {self.threads} thread{'s' if self.threads != 1 else ''}",
            ylabel="median latency, ms (p10 to p90)",
        )

    def _group(self, batch_size: int | None, runtime: str, precision: str) -> str:
        batch = [] if batch_size is None else [f"batch {batch_size}"]
        return "\n".join([*([f"{runtime} {precision}"] if self.several else []), *batch])

    def _speedup(self, row: BenchmarkRow) -> str:
        if row.model == self.baseline:
            return "1"
        return f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"

    def _nodes(self, row: BenchmarkRow) -> str:
        total, here = sum(row.nodes.values()), row.nodes.get(self.provider, 0)
        return str(total) if here == total else f"{here} of {total}"
