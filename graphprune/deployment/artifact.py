"""What `export` wrote and found, as data and text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.files import replacing
from ..support.types import PathLike


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file that a runtime takes. Can be used wherever a path can.

    `files`: all that belong together, `path` last. `precision`: as asked; `in_force`: what the runtime says that really
    runs, in its own words, empty where it says nothing. `layout`, `versions`, `features`: of the runtime, its packages
    and the CPU. `any_batch`: the file takes other batch sizes than `batch_size`. `size`: bytes of all files.
    `max_relative_error`: max|runtime - torch| / max|torch|, `relative_error`: the root of the summed squares of
    (runtime - torch) over those of torch; the largest over outputs, against the model in float32 on the example input.
    `tolerance`: what the first may be; None in int8, where the error is told and not judged. `evaluation`: what the
    user's `evaluate` returned. `latency_ms`: milliseconds for one call with the example, the median of `rounds` samples
    with `threads` threads; `clock`: what was read, "wall" or "cpu" (see `graphprune.benchmark`). `notes`: what else
    must be known.
    """

    path: Path
    files: tuple[Path, ...]
    runtime: str
    precision: str
    in_force: str
    layout: str
    versions: Mapping[str, str]
    features: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_size: int | None
    any_batch: bool
    size: int
    max_relative_error: float | None
    relative_error: float | None
    tolerance: float | None
    evaluation: Any
    latency_ms: float | None
    clock: str
    rounds: int
    threads: int
    notes: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        batch = "any batch size" if self.any_batch else f"batch size {self.batch_size}"
        force = f" (runs {self.in_force})" if self.in_force and self.in_force != self.precision else ""
        facts = [f"{self.runtime}, {self.precision}{force}", batch, f"{self.size / 2**20:.2f} MiB"]
        if self.max_relative_error is not None and self.tolerance is not None:
            facts.append(f"relative error {self.max_relative_error:.2g} (allowed {self.tolerance:.2g})")
        elif self.relative_error is not None:
            facts.append(f"relative error {self.relative_error:.2g} (squares; largest {self.max_relative_error:.2g})")
        else:
            facts.append("not compared")
        if self.evaluation is not None:
            facts.append(f"evaluation {_number(self.evaluation)}")
        if self.latency_ms is not None:
            threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
            clock = "" if self.clock == "wall" else f", {self.clock} time"
            facts.append(f"{self.latency_ms:.3f} ms ({threads}{clock})")
        lines = [f"{self.path}: {', '.join(facts)}", *(f"  note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers; an evaluation that is none of these as text."""
        result = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("files", "features", "inputs", "outputs", "notes"):
            result[name] = [str(value) for value in result[name]]
        result["path"], result["versions"] = str(self.path), dict(self.versions)
        try:
            json.dumps(self.evaluation, allow_nan=False)
        except (TypeError, ValueError):
            result["evaluation"] = str(self.evaluation)
        return result

    def to_json(self, path: PathLike) -> Path:
        """Write `to_dict()` as a JSON file. Raises GraphPruneError where the path cannot be written."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
