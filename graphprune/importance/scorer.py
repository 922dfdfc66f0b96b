"""Scores of all groups of one model: the criterion, what it looks at, and what it said before."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from ..dependency import DependencyGraph, Group
from ..plans.surgery import Fold, fold_names, folded_tensors
from ..support.progress import stage
from ..support.walking import all_modules, named_tensors
from ..tracing.trace import Trace
from . import BatchNormLink, Criterion, ImportanceContext, normalise
from .calibration import Calibration
from .calibration.stored import StoredStatistics


class Scorer:
    """Scores of groups, computed once per set of members even when groups are rebuilt."""

    def __init__(
        self,
        model: nn.Module,
        folds: list[Fold],
        criterion: Criterion,
        seed: int,
        normalised: bool,
        calibration: Calibration | None,
        compared: bool = False,
        trace: Trace | None = None,
    ) -> None:
        tensors = {n: t.detach() for n, t in named_tensors(model).items()}
        stored = None if trace is None else StoredStatistics(trace, tensors)
        self.meta = any(t.is_meta for t in tensors.values())
        links = {}
        if folds and not self.meta:
            tensors = {**tensors, **folded_tensors(model, folds)} if criterion.folded else tensors
            modules = all_modules(model)
            for fold in folds:
                norm = modules[fold.batch_norm]
                if isinstance(norm.weight, Tensor):
                    links[fold_names(fold)[0]] = BatchNormLink(norm.weight.detach(), fold.axis, fold.batch_norm)
        options: dict[str, Any] = {"bn": links, "seed": seed, "calibration": calibration, "compared": compared}
        self.context = ImportanceContext(model, tensors, **options, stored=stored)
        self.criterion = criterion
        self.normalised = normalised
        self.cache: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, graph: DependencyGraph) -> dict[int, np.ndarray]:
        keys = {g.index: tuple((m.parameter, m.axis, m.positions.tobytes()) for m in g.members) for g in graph.groups}
        new = [group for group in graph.groups if keys[group.index] not in self.cache]
        with stage("ranking", len(new), "groups") as now:
            for group in new:
                now.tell(group.name)
                self.cache[keys[group.index]] = self._scores(group)
                now.advance()
        return {index: self.cache[key] for index, key in keys.items()}

    def _scores(self, group: Group) -> np.ndarray:
        if self.meta:  # no weights to look at: keep the first ones
            scores = np.arange(group.size, 0, -1, dtype=np.float64)
        else:
            scores = self.criterion(self.context, group)
        return normalise(scores, self.criterion.normaliser) if self.normalised else scores
