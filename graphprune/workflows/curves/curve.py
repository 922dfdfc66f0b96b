"""Curves of error against removed units: as data, as JSON, as a plot and as a criterion."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...dependency.groups import Group, GroupKind
from ...errors import GraphPruneError
from ...importance import Criterion, ImportanceContext, resolve_criterion
from ...importance.context import Floats
from ...importance.reconstruction import scores_in_order
from ...support.documents import read_document, write_document
from ...support.plots import new_figure, save_figure
from ...support.types import PathLike

FORMAT = "graphprune.sensitivity/1"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One group pruned alone: `errors[i]` with `removed[i]` of its `size` units gone; `removed` rises from 1."""

    name: str
    kind: GroupKind
    size: int
    removed: tuple[int, ...]
    errors: tuple[float, ...]

    def marginal(self) -> Floats:
        """What each unit adds to the error as it goes, first to last, shape (size,): the slopes of the greatest convex
        function below the curve, which starts at no error and never falls. Beyond the last width measured the last
        slope goes on."""
        lengths, slopes = self._pieces()
        return np.repeat(slopes, lengths)

    def _total(self) -> float:
        """What all units together add by `marginal`."""
        lengths, slopes = self._pieces()
        return float((lengths * slopes).sum())

    def _pieces(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """The slopes, and for how many units each of them goes on."""
        x = np.array([0, *self.removed], np.float64)
        y = np.maximum.accumulate(np.array([0.0, *self.errors]))
        hull = [0]
        for i in range(1, len(x)):
            while len(hull) > 1 and _slope(x, y, hull[-2], hull[-1]) >= _slope(x, y, hull[-1], i):
                hull.pop()
            hull.append(i)
        if len(hull) < 2:
            return np.array([self.size], np.int64), np.zeros(1)
        slopes = np.array([_slope(x, y, a, b) for a, b in itertools.pairwise(hull)])
        ends = np.array([*(int(x[b]) for b in hull[1:-1]), self.size], np.int64)
        return np.diff(ends, prepend=0), slopes


def _slope(x: Floats, y: Floats, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Curves of all groups of one network; made by `graphprune.sensitivity`.

    `measure`: "loss" (rise of the mean loss) or "error" (squared difference of the outputs, relative). `order`: name of
    the criterion by which units went. `source`: hash of the weights and data they were measured with.
    """

    measure: str
    order: str
    source: str
    curves: tuple[Curve, ...]

    @property
    def criterion(self) -> Criterion:
        """A criterion for `plan` and `prune`, best with a budget: units rank as in `order`, and their scores are what
        their removal adds by the curve, comparable across groups. Groups without a curve go last."""
        return self.ordered_by(self.order)

    def ordered_by(self, criterion: Any) -> Criterion:
        """The same with another criterion (a name, function or object) for the order of units inside a group."""
        base = resolve_criterion(criterion)
        found = {(c.name, c.kind, c.size): c for c in self.curves}
        worst = max((c._total() for c in self.curves), default=1.0)

        def scores(context: ImportanceContext, group: Group) -> Floats:
            order = np.argsort(-base(context, group), kind="stable")[::-1]
            curve = found.get((group.name, group.kind, group.size))
            added = np.full(group.size, worst) if curve is None else curve.marginal()
            return scores_in_order(order.tolist(), added.tolist())

        return Criterion(f"sensitivity ({base.name})", scores, comparable=True, needs=base.needs)

    def plot(self, path: PathLike) -> Path:
        """Draw error against the fraction removed, a line for each group. Needs matplotlib.

        Raises GraphPruneError where it is missing, without curves, and for paths that cannot be written.
        """
        if not self.curves:
            raise GraphPruneError("nothing to draw: no group has a curve")
        figure, axes = new_figure(8.0, 5.0)
        for curve in self.curves:
            shares = [0.0, *(100 * n / curve.size for n in curve.removed)]
            axes.plot(shares, [0.0, *curve.errors], marker=".", linewidth=1, label=f"{curve.name} ({curve.size})")
        axes.set_xlabel("units removed, %")
        axes.set_ylabel("rise of the loss" if self.measure == "loss" else "relative squared error of the outputs")
        axes.set_yscale("symlog", linthresh=max(1e-9, self._smallest()))
        axes.spines[["top", "right"]].set_visible(False)
        columns = -(-len(self.curves) // 24)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize=6, frameon=False, ncols=columns)
        return save_figure(figure, path)

    def _smallest(self) -> float:
        """A tenth of the median error: below it the axis is linear."""
        return float(np.median([abs(e) for c in self.curves for e in c.errors])) / 10

    def save(self, path: PathLike) -> Path:
        """Write the curves as JSON with a digest. Raises GraphPruneError when the path cannot be written."""
        return write_document(path, {"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: PathLike) -> Sensitivity:
        """Read what `save` wrote. Raises GraphPruneError when there is none, it is damaged, or was changed since."""
        data = read_document(path, "sensitivity file")
        try:
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}")
            curves = tuple(_curve(c) for c in data["curves"])
            measure, order, source = (data[name] for name in ("measure", "order", "source"))
            if measure not in ("loss", "error") or not isinstance(order, str) or not isinstance(source, str):
                raise ValueError("it does not say what was measured")
            return cls(measure, order, source, curves)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise GraphPruneError(f"{path} is no sensitivity file: {type(error).__name__}: {error}") from error


def _curve(data: Any) -> Curve:
    name, kind, size, removed, errors = (data[f] for f in ("name", "kind", "size", "removed", "errors"))
    whole = all(type(n) is int for n in (size, *removed))
    if not whole or not all(type(e) is float for e in errors) or not all(isinstance(t, str) for t in (name, kind)):
        raise ValueError(f"the curve of {str(name)[:60]} has values of another type")
    rising = all(a < b for a, b in zip((0, *removed), (*removed, size), strict=True))
    if len(removed) != len(errors) or not rising or not np.isfinite(errors).all():
        raise ValueError(f"the curve of {name[:60]} is inconsistent")
    return Curve(name, GroupKind(kind), size, tuple(removed), tuple(errors))
