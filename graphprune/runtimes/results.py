"""What a benchmark found, as data, table, JSON and plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import GraphPruneError
from ..support.files import replacing
from ..support.plots import grouped_bars
from ..support.tables import Column, render, table
from ..support.types import PathLike


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One model at one batch size.

    Times are milliseconds for one call with the whole batch; each of `samples_ms` (one per round) is the mean over
    `calls` calls in a row, and `median_ms`, `p10_ms` and `p90_ms` are over these samples. `speedup` is
    median(baseline) / median(this), from `speedup_low` to `speedup_high` with 95 % confidence (paired bootstrap over
    rounds; all three 1 for the baseline itself). `nodes`: how many nodes of ONNX Runtime's optimised graph run on
    which provider. `parameters`: of the module, or elements of the floating-point initializers of a file.
    `file_mib`: size of the ONNX file. `max_relative_error`: ONNX Runtime on the CPU against torch, None if not checked.
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
    parameters: int
    file_mib: float
    max_relative_error: float | None
    samples_ms: tuple[float, ...]

    @property
    def items_per_second(self) -> float:
        """Throughput at the median: batch size / time."""
        return 1000 * (self.batch_size or 1) / self.median_ms

    def share_on(self, provider: str) -> float:
        """Share of the nodes that run on `provider`, from 0 to 1."""
        return self.nodes.get(provider, 0) / max(1, sum(self.nodes.values()))


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

    def row(self, model: str, batch_size: int | None = None) -> BenchmarkRow:
        """The row of `model` at `batch_size`, its first if None.

        Raises:
            GraphPruneError: there is no such row.
        """
        for row in self.rows:
            if row.model == model and batch_size in (None, row.batch_size):
                return row
        known = sorted({(row.model, row.batch_size) for row in self.rows}, key=str)
        raise GraphPruneError(f"no row for model {model!r} at batch size {batch_size}; there are {known}")

    def table(self) -> Table:
        """The rows as a `rich` table."""
        columns = [
            Column("model", "model", justify="left"),
            Column("batch", "batch_size"),
            Column("median ms", "median_ms", ".3f"),
            Column("p10", "p10_ms", ".3f"),
            Column("p90", "p90_ms", ".3f"),
            Column("items/s", lambda row: row.items_per_second, ".1f"),
            Column("speed-up", lambda row: row, self._speedup),
            Column("parameters", "parameters", ","),
            Column("MiB", "file_mib", ".2f"),
            Column("nodes", lambda row: row, self._nodes),
            Column("rel. error", "max_relative_error", ".1e"),
        ]
        return table(self.rows, columns, title=f"Latency in ONNX Runtime, speed-up against {self.baseline!r} (95 %)")

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
        batches = list(dict.fromkeys(row.batch_size for row in self.rows))
        names = list(dict.fromkeys(row.model for row in self.rows))
        cells = {name: [self._cell(name, batch) for batch in batches] for name in names}
        return grouped_bars(
            path,
            ["" if batch is None else f"batch {batch}" for batch in batches],
            {name: [row.median_ms for row in rows] for name, rows in cells.items()},
            lower={name: [row.p10_ms for row in rows] for name, rows in cells.items()},
            upper={name: [row.p90_ms for row in rows] for name, rows in cells.items()},
            labels={name: [f"{row.speedup:.2f}×" for row in rows] for name, rows in cells.items()},
            title=f"{self.provider}, {self.threads} thread{'s' if self.threads != 1 else ''}",
            ylabel="median latency, ms (p10 to p90)",
        )

    def _cell(self, model: str, batch_size: int | None) -> BenchmarkRow:
        return next(row for row in self.rows if row.model == model and row.batch_size == batch_size)

    def _speedup(self, row: BenchmarkRow) -> str:
        if row.model == self.baseline:
            return "1"
        return f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"

    def _nodes(self, row: BenchmarkRow) -> str:
        total, here = sum(row.nodes.values()), row.nodes.get(self.provider, 0)
        return str(total) if here == total else f"{here} of {total}"
