"""Curves of error against removed units: as data, as JSON, as a plot and as a criterion."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ...dependency.groups import Group
from ...errors import GraphPruneError
from ...importance import Criterion, ImportanceContext, resolve_criterion
from ...importance.context import Floats
from ...importance.reconstruction import scores_in_order
from ...support.files import replacing
from ...support.plots import new_figure, save_figure
from ...support.types import PathLike

FORMAT = "graphprune.sensitivity/1"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One group pruned alone: `errors[i]` with `removed[i]` of its `size` units gone; `removed` rises from 1."""

    name: str
    kind: str
    size: int
    removed: tuple[int, ...]
    errors: tuple[float, ...]

    def marginal(self) -> Floats:
        """What each unit adds to the error as it goes, first to last, shape (size,): the slopes of the greatest convex
        function below the curve, which starts at no error and never falls. Beyond the last width measured the last
        slope goes on."""
        x = np.array([0, *self.removed], np.float64)
        y = np.maximum.accumulate(np.array([0.0, *self.errors]))
        hull = [0]
        for i in range(1, len(x)):
            while len(hull) > 1 and _slope(x, y, hull[-2], hull[-1]) >= _slope(x, y, hull[-1], i):
                hull.pop()
            hull.append(i)
        slopes = np.zeros(self.size)
        for a, b in itertools.pairwise(hull):
            slopes[int(x[a]) :] = _slope(x, y, a, b)
        return slopes


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
        found = {(c.name, c.kind, c.size): c.marginal() for c in self.curves}
        worst = max((float(m.sum()) for m in found.values()), default=1.0)

        def scores(context: ImportanceContext, group: Group) -> Floats:
            order = np.argsort(-base(context, group), kind="stable")[::-1]
            unmeasured = np.full(group.size, worst)
            return scores_in_order(order.tolist(), found.get((group.name, group.kind, group.size), unmeasured).tolist())

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
        """Write the curves as JSON. Raises GraphPruneError when the path cannot be written."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1), encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: PathLike) -> Sensitivity:
        """Read what `save` wrote. Raises GraphPruneError when there is none or it is damaged."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}")
            curves = tuple(_curve(c) for c in data["curves"])
            return cls(str(data["measure"]), str(data["order"]), str(data["source"]), curves)
        except OSError as error:
            raise GraphPruneError(f"the sensitivity file {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise GraphPruneError(f"{path} is no sensitivity file: {type(error).__name__}: {error}") from error


def _curve(data: Any) -> Curve:
    size, removed = int(data["size"]), tuple(int(n) for n in data["removed"])
    errors = tuple(float(e) for e in data["errors"])
    rising = all(a < b for a, b in zip((0, *removed), (*removed, size), strict=True))
    if len(removed) != len(errors) or not rising or not np.isfinite(errors).all():
        raise ValueError(f"the curve of {data['name']} is inconsistent")
    return Curve(str(data["name"]), str(data["kind"]), size, removed, errors)
