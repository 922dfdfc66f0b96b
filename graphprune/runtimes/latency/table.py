"""The latency table of one machine: times of computations at some lengths, and between them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import RegularGridInterpolator

from ...errors import GraphPruneError
from ...support.documents import read_document, write_document
from ...support.types import PathLike
from .chains import KINDS, kind_of
from .context import Context
from .kernels import Kernel, Sample
from .meters import Meter
from .stairs import PERIOD, SMOOTH, ChainMeter, Stairs, scan

Floats = npt.NDArray[np.float64]
FORMAT = "graphprune.latency/1"
# Where along an axis, as fractions of its full length, a kernel is measured; between them time is nearly linear.
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
# Lengths whose stairs count, per operation; the others (batches, groups, rows) are multiples of whole computations.
_STEPPED = {
    "conv": ("inputs", "outputs"),
    "depthwise": ("channels",),
    "linear": ("inputs", "outputs"),
    "matmul": ("inner", "columns"),
}


@dataclasses.dataclass
class LatencyTable:
    """Times measured on one machine with one provider and number of threads, by kernel and lengths.

    `about`: provider, threads, machine and versions, for people and to tell tables apart. `points`: seconds. `stairs`:
    by kind of computation. `contexts`: by the structural hash of a model, what its own run adds to the points.
    `meter`, `chain_meter`: measure what is missing; None for a table that was brought from another machine, where
    what is missing is an error.
    """

    about: Mapping[str, Any]
    points: dict[Kernel, dict[tuple[int, ...], float]] = dataclasses.field(default_factory=dict)
    stairs: dict[str, Stairs] = dataclasses.field(default_factory=dict)
    contexts: dict[str, Context] = dataclasses.field(default_factory=dict)
    meter: Meter | None = None
    chain_meter: ChainMeter | None = None

    def __post_init__(self) -> None:
        self._surfaces: dict[tuple[Kernel, tuple[int, ...], tuple[bool, ...]], Surface] = {}

    def ensure(self, samples: Sequence[Sample]) -> None:
        """Measure those of the samples that are not in the table."""
        missing = [s for s in dict.fromkeys(samples) if s.lengths not in self.points.get(s.kernel, {})]
        if not missing:
            return
        if self.meter is None:
            raise GraphPruneError(
                f"latency table: it holds no time of {missing[0].kernel} at {missing[0].lengths} and "
                f"{len(missing) - 1} more; make it on its machine with graphprune.latency_table for this model"
            )
        for sample, (seconds, _) in zip(missing, self.meter(missing), strict=True):
            self.points.setdefault(sample.kernel, {})[sample.lengths] = seconds

    def stairs_of(self, kernel: Kernel) -> Stairs:
        """The stairs that the widths of this kernel follow, scanned when first needed."""
        kind = kind_of(kernel)
        if kind is None:
            return SMOOTH
        if kind not in self.stairs:
            if self.chain_meter is None:
                raise GraphPruneError(f"latency table: it holds no stairs of kind {kind!r}; make it on its machine")
            self.stairs[kind] = scan(self.chain_meter, kind)
        return self.stairs[kind]

    def surface(self, kernel: Kernel, full: tuple[int, ...], free: tuple[bool, ...]) -> Surface:
        """Time of a kernel over its lengths, each from almost nothing to `full` where it is free."""
        key = (kernel, full, free)
        if key not in self._surfaces:
            stairs = self.stairs_of(kernel)
            stepped = tuple(name in _STEPPED.get(kernel.op, ()) for name in kernel.lengths)
            grids = [
                _grid(n, stairs if s else SMOOTH) if f else np.array([n])
                for n, s, f in zip(full, stepped, free, strict=True)
            ]
            lengths = [tuple(int(v) for v in at) for at in itertools.product(*grids)]
            self.ensure([Sample(kernel, at) for at in lengths])
            points = self.points[kernel]
            values = np.array([points[at] for at in lengths]).reshape([len(g) for g in grids])
            self._surfaces[key] = Surface(tuple(grids), values, tuple(stairs if s else SMOOTH for s in stepped))
        return self._surfaces[key]

    def save(self, path: PathLike) -> Path:
        """Write the table as JSON with a digest, to a temporary name first. Raises GraphPruneError when the path cannot
        be written."""
        document = {
            "format": FORMAT,
            "about": dict(self.about),
            "stairs": {k: {"steps": s.steps, "penalty": s.penalty} for k, s in self.stairs.items()},
            "points": {
                str(k): {"x".join(map(str, at)): seconds for at, seconds in found.items()}
                for k, found in self.points.items()
            },
            "contexts": {name: context.to_dict() for name, context in self.contexts.items()},
        }
        return write_document(path, document, indent=0)

    @classmethod
    def of(cls, table: LatencyTable | PathLike) -> LatencyTable:
        """The table, or the one in the file of that path."""
        return table if isinstance(table, LatencyTable) else cls.load(table)

    @classmethod
    def load(cls, path: PathLike) -> LatencyTable:
        """Read a table. Raises GraphPruneError for a file that is none, or was changed since it was written."""
        document = read_document(path, "latency table")
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise GraphPruneError(f"latency table {path}: not a table (its format must be {FORMAT!r})")
        try:
            points = {Kernel.parse(k): _points(k, v) for k, v in document["points"].items()}
            stairs = {k: Stairs(tuple(v["steps"]), tuple(v["penalty"])) for k, v in document["stairs"].items()}
            contexts = {k: Context.from_dict(v) for k, v in document["contexts"].items()}
            about = dict(document["about"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise GraphPruneError(f"latency table {path}: damaged ({type(error).__name__}: {error})") from error
        if not set(stairs) <= set(KINDS):
            raise GraphPruneError(f"latency table {path}: unknown kinds of stairs {sorted(set(stairs) - set(KINDS))}")
        return cls(about, points, stairs, contexts)


def _points(kernel: str, found: Mapping[str, Any]) -> dict[tuple[int, ...], float]:
    count = len(Kernel.parse(kernel).lengths)
    out = {}
    for text, seconds in found.items():
        good = re.fullmatch(r"\d{1,9}(x\d{1,9})*", text) and isinstance(seconds, float) and 0 <= seconds < 1e6
        at = tuple(int(v) for v in text.split("x")) if good else ()
        if len(at) != count:
            raise ValueError(f"{text!r}: {seconds!r} is no time of {kernel}")
        out[at] = float(seconds)
    return out


def _grid(full: int, stairs: Stairs) -> npt.NDArray[np.int64]:
    wanted = np.maximum(1, np.round(np.array(_FRACTIONS) * full)).astype(np.int64)
    return np.unique(np.minimum(stairs.up(wanted), full))


class Surface:
    """Seconds over lengths: linear between the measured ones, a step where the machine has one."""

    def __init__(self, grids: tuple[npt.NDArray[np.int64], ...], values: Floats, stairs: tuple[Stairs, ...]) -> None:
        self._free = [i for i, g in enumerate(grids) if len(g) > 1]
        self._stairs = stairs
        self._full = [int(g[-1]) for g in grids]
        self._least = float(values.min()) * 0.05
        axes = [grids[i].astype(np.float64) for i in self._free]
        self._constant = float(values.reshape(-1)[0])
        self._inner = (
            RegularGridInterpolator(axes, values.squeeze(), bounds_error=False, fill_value=None) if axes else None
        )

    def __call__(self, lengths: Sequence[npt.ArrayLike]) -> Floats:
        """Seconds at these lengths (numbers or arrays of one shape)."""
        whole = [np.maximum(1, np.rint(np.asarray(n, np.float64))).astype(np.int64) for n in lengths]
        shape = np.broadcast_shapes(*(w.shape for w in whole))
        if self._inner is None:
            return np.full(shape, self._constant)
        at, factor = [], np.ones(shape)
        for i in self._free:
            full, stairs = self._full[i], self._stairs[i]
            up = np.minimum(stairs.up(whole[i]), full)
            at.append(np.broadcast_to(up, shape))
            factor = factor * np.where(up < full, stairs.factor(whole[i]), 1.0)
        found: Floats = self._inner(np.stack(at, -1)).reshape(shape) * factor
        return np.maximum(found, self._least)


__all__ = ["PERIOD", "LatencyTable", "Surface"]
