"""Turn scores into a number of units to keep per group, under the constraints, and into the units themselves."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from ...dependency import DependencyGraph, Group
from ...errors import GraphPruneError
from .budget import Budget, Limit, UnreachableBudget, Widths
from .costs import mac_costs
from .selection import apart, chosen_groups, kinds_of, matching_ratios
from .staircase import StairWidths
from .steps import AUTO, FINE, NEAR, Item, RoundTo, around, check_round_to, on_average, widths

Floats = npt.NDArray[np.float64]
SCOPES = ("local", "global", "isomorphic")


# Kinds of groups of which networks have one in each of many equal layers; features of queries and values go alike.
_OF_LAYERS = frozenset(("mlp channel", "head feature", "qk feature", "v feature"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    ratio: float | Mapping[str, float]
    scope: str = "local"
    round_to: RoundTo = 1
    min_channels: int = 1
    granularity: str | Sequence[str] = "auto"
    budget: Budget | None = None
    max_ratio: float = 1.0
    steady: bool = False  # "auto" chooses the same groups for every ratio

    @classmethod
    def of(cls, ratio: float | Mapping[str, float] | None, budget: Budget | None, **others: Any) -> Settings:
        """From the public arguments, of which `ratio` and `budget` exclude each other; without both, half goes."""
        if budget is not None and not isinstance(budget, Budget):
            raise GraphPruneError(f"budget: expected a graphprune.Budget, got {type(budget).__name__}")
        if budget is not None and ratio is not None:
            raise GraphPruneError("ratio and budget exclude each other: a budget decides how much of each group stays")
        return cls(0.5 if ratio is None else ratio, budget=budget, **others)

    def check(self) -> None:
        if self.scope not in SCOPES:
            raise GraphPruneError(f"scope: expected one of {', '.join(map(repr, SCOPES))}, got {self.scope!r}")
        check_round_to(self.round_to)
        least = self.min_channels
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise GraphPruneError(f"min_channels: expected an integer of at least 1, got {least!r}")
        kinds_of(self.granularity)
        limit = self.max_ratio
        if isinstance(limit, bool) or not isinstance(limit, (int, float, np.floating)) or not 0 < limit <= 1:
            raise GraphPruneError(
                f"max_ratio: expected the largest fraction that a group may lose, in (0, 1], got {limit!r}"
            )

    def floor(self, size: int) -> int:
        """The least number of `size` units that must stay."""
        return min(size, max(1, math.ceil(size * (1 - self.max_ratio) - 1e-9)))

    @property
    def auto(self) -> bool:
        """Whether widths are those that runtimes like."""
        return self.round_to == AUTO

    def widths(self, size: int, kind: str) -> npt.NDArray[np.int64]:
        """The widths that `size` units of a group of this kind may have."""
        return widths(size, self.round_to, kind == "head")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Removed units per group (indices into the group, sorted), and a mask over components. `asked`: how many units of
    a group should have stayed by its ratio, a real number; none for groups without one, or under a budget. `weights`:
    what each group counts in means over groups, where there are ratios."""

    removed: dict[int, npt.NDArray[np.int64]]
    gone: npt.NDArray[np.bool_]
    asked: Mapping[int, float] = dataclasses.field(default_factory=dict)
    weights: Floats | None = None


@dataclasses.dataclass
class _Cell:
    """Units of one group that lie in the same blocks of all equal-count constraints. `asked`: how many should stay
    before rounding; `keep`: how many do, at least `floor`."""

    group: int
    units: npt.NDArray[np.int64]
    asked: float = 0.0
    keep: int = 0
    floor: int = 1


def allocate(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int] | None = None,
    limits: Sequence[Limit] = (),
) -> Allocation:
    """Decide what goes. `scores[g]` holds one score per unit of group g (higher stays; on one scale for
    all groups unless the scope is local); `forced[g]` fixes how many units of a group stay. With `limits`, widths are
    chosen so that these costs are kept, and ratios are not looked at.

    Raises GraphPruneError for limits that cannot be met."""
    forced = forced or {}
    if limits:
        return _within(graph, scores, settings, forced, limits, chosen_groups(graph, settings.granularity))
    asked = matching_ratios(settings.ratio, graph)
    chosen = chosen_groups(graph, settings.granularity, _losing(graph, asked, settings))
    ratios = [r if c else 0.0 for r, c in zip(asked, chosen, strict=True)]
    wanted = _asked_per_group(graph, scores, ratios, settings.scope)
    keep = _keep_per_group(graph, wanted, ratios, settings)
    made = _allocation(graph, scores, settings, forced, keep, ratios)
    shares = {i: wanted[i] for i, ratio in enumerate(ratios) if ratio}
    return dataclasses.replace(made, asked=shares, weights=macs_by_group(graph))


def _losing(graph: DependencyGraph, ratios: Sequence[float], settings: Settings) -> list[bool] | None:
    """Which groups a ratio takes a unit from; None where the choice must stay the same from step to step."""
    if settings.steady:
        return None
    return [
        _round(g.size - nearest(ratios[g.index] * g.size), g.size, settings) < g.size or not ratios[g.index]
        for g in graph.groups
    ]


def _allocation(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    wanted: Sequence[float],
    ratios: Sequence[float] | None,
) -> Allocation:
    """The allocation nearest to the wanted widths that obeys the equal-count constraints."""
    cells, constraints = _cells(graph, apart(settings.granularity))
    kinds = kinds_of(settings.granularity)
    for cell in cells:
        size = graph.groups[cell.group].size
        keep = forced.get(cell.group, wanted[cell.group])
        exact = ratios is None or cell.group in forced
        cell.asked = keep * len(cell.units) / size
        cell.keep = _share(cell, keep, size, settings, 0.0 if ratios is None else ratios[cell.group], exact)
        if cell.group not in forced:
            alien = kinds is not None and graph.groups[cell.group].kind not in kinds
            cell.floor = len(cell.units) if alien else settings.floor(len(cell.units))
            cell.keep = max(cell.keep, cell.floor)
    systems = _systems(cells, constraints)
    if settings.auto:
        _round_on_average(graph, scores, settings, cells, systems, forced)
    for system in systems:
        _solve(cells, system)
    return _select(graph, scores, cells)


# The widths are chosen for a scaled limit and then changed by the constraints of the code. Rounds in which the scale is
# searched, how much of the limit used is near enough, and the scale from which on raising it changes nothing.
_ROUNDS, _NEAR, _FREE = 24, 0.995, 4.0
# A limit that is used less is not met; and what is then tried in place of the widths of "auto".
_MET = 0.99
_FINER: tuple[RoundTo, ...] = (AUTO, 4, 1)


def _within(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    limits: Sequence[Limit],
    chosen: Sequence[bool],
) -> Allocation:
    """Widths within the limits: what equal counts and shared indices add is found out exactly, and taken off.

    Under "auto" a small network may have no such widths that use what is allowed; then finer ones are taken."""
    best: _Found | None = None
    for round_to in _FINER if settings.auto else (settings.round_to,):
        stepped = dataclasses.replace(settings, round_to=round_to)
        try:
            found = _searched(graph, scores, stepped, forced, limits, chosen)
        except UnreachableBudget:
            if best is None and round_to == (_FINER[-1] if settings.auto else settings.round_to):
                raise
            continue
        if found is not None and (best is None or found.used > best.used):
            best = found
        if best is not None and best.used >= _MET:
            break
    if best is None:
        names = " and ".join(limit.name for limit in limits)
        raise UnreachableBudget(
            f"budget: no widths were found that keep {names} within the budget and obey the equal-count constraints of "
            f"this model; raise the budget or lower min_channels"
        )
    return best.allocation


@dataclasses.dataclass(frozen=True)
class _Found:
    """`used`: the largest share of a limit. `kept`: minus the score that goes."""

    allocation: Allocation
    used: float
    kept: float


def _searched(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    forced: Mapping[int, int],
    limits: Sequence[Limit],
    chosen: Sequence[bool],
) -> _Found | None:
    """What fits of the widths chosen for limits of several scales: the one that keeps most where widths have steps,
    between which there may be no way to use more, else the one that uses most."""
    groups = graph.groups
    allowed = [settings.widths(g.size, g.kind) for g in groups]
    floors, ceilings = [], []
    for group, possible in zip(groups, allowed, strict=True):
        least = max(settings.floor(group.size), min(settings.min_channels, group.size))
        ceilings.append(forced.get(group.index, group.size))
        free = chosen[group.index] and group.index not in forced
        floors.append(int(possible[np.searchsorted(possible, least)]) if free else ceilings[-1])
    stairs = any(limit.stairs is not None for limit in limits)
    chooser = (StairWidths if stairs else Widths)([scores[g.index] for g in groups], floors, ceilings, allowed)
    steps = stairs or settings.round_to != 1
    best: _Found | None = None
    scale, fits, exceeds = 1.0, 0.0, math.inf
    for _ in range(_ROUNDS):
        try:
            wanted = chooser.choose(limits, scale)
        except GraphPruneError:
            if best is None and scale >= 1:
                raise  # not even the floors fit
            fits, scale = max(fits, scale), (scale + min(exceeds, _FREE)) / 2
            continue
        made = _allocation(graph, scores, settings, forced, wanted.tolist(), None)
        used = max(limit.cost.exact(made.gone) / limit.most for limit in limits)
        if used <= 1 + 1e-12:
            fits = scale
            new = _Found(made, used, -sum(float(scores[g][lost].sum()) for g, lost in made.removed.items()))
            if best is None or (new.kept > best.kept if steps else used > best.used):
                best = new
            exact = steps and all(g.size - len(made.removed.get(g.index, ())) == wanted[g.index] for g in groups)
            if used >= _NEAR or scale >= _FREE or exact:
                break
        else:
            exceeds = scale
        scale = min(scale / used, _FREE) if fits == 0 or math.isinf(exceeds) else (fits + exceeds) / 2
    return best


def _round_on_average(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    settings: Settings,
    cells: Sequence[_Cell],
    systems: Sequence[_System],
    forced: Mapping[int, int],
) -> None:
    """Give every cell an allowed width next to what was asked. Cells that must stay equal go the same way, and so do
    equal layers of a transformer, whose widths a configuration can then hold. Whole heads are rounded to nearest."""
    together = _in_step(graph, cells, systems)
    weights = macs_by_group(graph)
    free = {cell.group for cell in cells if cell.asked < len(cell.units) and cell.group not in forced}
    all_of_it = float(weights[list(free)].sum())
    best = math.inf
    for grid in (AUTO, FINE):
        ends = [
            [_ends(graph.groups[cells[c].group], cells[c], settings, grid, cells[c].group in forced) for c in members]
            for members in together
        ]
        items = [
            _item(graph, scores, [cells[c] for c in members], pairs, forced, weights)
            for members, pairs in zip(together, ends, strict=True)
        ]
        down, off = on_average(items)
        if off < best - 1e-12:
            best = off
            keep = [[low if d else high for low, high in pairs] for pairs, d in zip(ends, down, strict=True)]
        if best <= NEAR * all_of_it:
            break
    for members, widths_of_set in zip(together, keep, strict=True):
        for c, width in zip(members, widths_of_set, strict=True):
            cells[c].keep = width


def macs_by_group(graph: DependencyGraph) -> Floats:
    """The multiply-accumulates that each group has a part in, relative to their mean; a little for those in none."""
    macs = mac_costs(graph).slopes(np.ones(len(graph.groups)))
    mean = float(macs.mean()) if len(macs) else 0.0
    return np.maximum(macs / mean, 1e-3) if mean > 0 else np.ones(len(graph.groups))


def _ends(group: Group, cell: _Cell, settings: Settings, grid: str, forced: bool) -> tuple[int, int]:
    """The allowed widths below and above what is asked; the same where there is no choice."""
    n = len(cell.units)
    if forced:
        return cell.keep, cell.keep
    least = max(cell.floor, math.ceil(min(settings.min_channels, group.size) * n / group.size))
    if group.kind == "head":
        keep = max(n - nearest(round(n - cell.asked, 9)), min(least, n), 1)
        return keep, keep
    return around(cell.asked, widths(n, grid), least)


def _item(
    graph: DependencyGraph,
    scores: Mapping[int, Floats],
    cells: Sequence[_Cell],
    ends: Sequence[tuple[int, int]],
    forced: Mapping[int, int],
    weights: Floats,
) -> Item:
    item = Item(0.0, 0.0, 0.0, 0.0)
    for cell, (low, high) in zip(cells, ends, strict=True):
        n, worth = len(cell.units), weights[cell.group] / graph.groups[cell.group].size
        between = np.sort(scores[cell.group][cell.units])[n - high : n - low]
        asked = low if cell.group in forced else cell.asked
        item = Item(
            item.asked + worth * (n - asked),
            item.less + worth * (n - high),
            item.more + worth * (n - low),
            item.loss + float(between.sum()),
        )
    return item


def _in_step(graph: DependencyGraph, cells: Sequence[_Cell], systems: Sequence[_System]) -> list[list[int]]:
    """Sets of cells that go the same way."""
    sets = [system.members for system in systems]
    bound = {c for members in sets for c in members}
    sets += [[c] for c in range(len(cells)) if c not in bound]
    found: dict[Any, list[int]] = {}
    for i, members in enumerate(sets):
        groups = [graph.groups[cells[c].group] for c in members]
        key: Any = i
        if all(g.kind in _OF_LAYERS for g in groups):
            alike = [g.structure if g.kind.startswith("mlp") else str(g.size) for g in groups]
            key = tuple((a, round(cells[c].asked, 6)) for a, c in zip(alike, members, strict=True))
        found.setdefault(key, []).extend(members)
    return list(found.values())


def nearest(value: float) -> int:
    """Rounding to nearest, halves up."""
    return math.floor(value + 0.5)


def _round(keep: int, size: int, settings: Settings) -> int:
    """The multiple nearest to `keep`, at least the least that must stay; under "auto" only that."""
    step = settings.round_to
    if isinstance(step, int) and step > 1 and keep < size:
        keep = min(size, max(step, nearest(keep / step) * step))
    return max(min(settings.min_channels, size), settings.floor(size), keep)


def _asked_per_group(
    graph: DependencyGraph, scores: Mapping[int, Floats], ratios: Sequence[float], scope: str
) -> list[float]:
    """How many units of each group should stay, before any rounding of widths."""
    groups = graph.groups
    if scope == "local":
        return [g.size - ratios[g.index] * g.size for g in groups]
    pools: dict[tuple[float, str], list[int]] = defaultdict(list)
    for g in groups:
        if ratios[g.index]:
            pools[(ratios[g.index], g.structure if scope == "isomorphic" else "")].append(g.index)
    keep = [float(g.size) for g in groups]
    for (ratio, _), indices in pools.items():
        flat = np.concatenate([scores[i] for i in indices])
        owner = np.repeat(indices, [groups[i].size for i in indices])
        drop = np.argsort(flat, kind="stable")[: nearest(ratio * len(flat))]
        lost = np.bincount(owner[drop], minlength=len(groups))
        for i in indices:
            keep[i] -= int(lost[i])
    return keep


def _keep_per_group(
    graph: DependencyGraph, asked: Sequence[float], ratios: Sequence[float], settings: Settings
) -> list[float]:
    """What is asked, rounded group by group; under "auto" as it is, since that rounds all groups together later."""
    if settings.auto:
        return list(asked)
    keep: list[float] = []
    for g in graph.groups:
        gone = nearest(ratios[g.index] * g.size) if settings.scope == "local" else g.size - int(asked[g.index])
        keep.append(_round(g.size - gone, g.size, settings) if ratios[g.index] else g.size)
    return keep


# One block of an equal-count constraint: how many indices each unit of a cell takes in it, and how many are immovable
_Block = tuple[dict[int, int], int]


def _cells(graph: DependencyGraph, apart: bool) -> tuple[list[_Cell], list[list[_Block]]]:
    """Cells, and the equal-count constraints over them. A unit may take several indices of a block.

    `apart`: without those constraints that are only good for speed."""
    label, equal = graph.analysis.label, [e for e in graph.analysis.equal if not (apart and e.soft)]
    total = int(label.max()) + 1
    counted = [[np.unique(label[p], return_counts=True) for p in constraint.blocks] for constraint in equal]
    rng = np.random.default_rng(0)
    columns = []
    for blocks in counted:
        column = np.zeros(total, np.uint64)
        for labels, n in blocks:
            column[labels] += n.astype(np.uint64) * rng.integers(1, 2**63, dtype=np.uint64)
        columns.append(column)
    cells: list[_Cell] = []
    cell_at = np.full(total, -1, np.int64)
    for group in graph.groups:
        components = graph.units(group)
        inverse = np.zeros(group.size, np.int64)
        if columns:
            key = np.stack([c[components] for c in columns])
            inverse = np.unique(key, axis=1, return_inverse=True)[1].reshape(-1)
        for k in range(int(inverse.max()) + 1):
            units = np.nonzero(inverse == k)[0]
            cell_at[components[units]] = len(cells)
            cells.append(_Cell(group.index, units))
    constraints = []
    for blocks in counted:
        made: list[_Block] = []
        for labels, n in blocks:
            inside = cell_at[labels]
            free = inside >= 0
            made.append((dict(zip(inside[free].tolist(), n[free].tolist(), strict=True)), int(n[~free].sum())))
        if any(block != made[0] for block in made):
            constraints.append(made)
    return cells, constraints


def _share(cell: _Cell, keep: float, size: int, settings: Settings, ratio: float, forced: bool) -> int:
    """How many of a group's kept units fall to one of its cells."""
    n = len(cell.units)
    if n == size or keep == size:
        return min(n, int(keep))
    if settings.scope == "local" and not forced and settings.round_to == 1:
        share = n - nearest(ratio * n)
    else:
        share = nearest(keep * n / size)
    return max(min(n, 1), min(n, share))


@dataclasses.dataclass(frozen=True)
class _System:
    """Constraints that are connected by cells, and those cells, ascending."""

    constraints: list[list[_Block]]
    members: list[int]


def _systems(cells: Sequence[_Cell], constraints: list[list[_Block]]) -> list[_System]:
    """The connected sets of constraints."""
    parent = list(range(len(cells)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for blocks in constraints:
        members = [c for block, _ in blocks for c in block]
        for c in members[1:]:
            parent[find(c)] = find(members[0])
    found: dict[int, list[list[_Block]]] = defaultdict(list)
    for blocks in constraints:
        first = next((c for block, _ in blocks for c in block), None)
        if first is not None:
            found[find(first)].append(blocks)
    return [_System(s, sorted({c for blocks in s for block, _ in blocks for c in block})) for s in found.values()]


def _solve(cells: list[_Cell], system: _System) -> None:
    """Make blocks equal: the integer solution nearest to the wanted numbers."""
    members = system.members
    column = {c: i for i, c in enumerate(members)}
    rows, right = [], []
    for blocks in system.constraints:
        first, stuck = blocks[0]
        for block, other in blocks[1:]:
            row = np.zeros(2 * len(members))
            for c, n in first.items():
                row[column[c]] += n
            for c, n in block.items():
                row[column[c]] -= n
            if row.any():
                rows.append(row)
                right.append(other - stuck)
    if not rows:
        return
    n = len(members)
    target = np.array([cells[c].keep for c in members], float)
    size = np.array([len(cells[c].units) for c in members], float)
    floor = np.array([cells[c].floor for c in members], float)
    if all(abs(np.dot(row[:n], target) - r) < 0.5 for row, r in zip(rows, right, strict=True)):
        return
    # minimise sum |keep - target| / size with keep integer: deviation variables bound the difference from both sides
    distance = np.zeros((2 * n, 2 * n))
    distance[:n, :n], distance[:n, n:] = np.eye(n), -np.eye(n)
    distance[n:, :n], distance[n:, n:] = -np.eye(n), -np.eye(n)
    result = milp(
        c=np.concatenate([np.zeros(n), 1 / size]),
        constraints=[
            LinearConstraint(np.stack(rows), right, right),
            LinearConstraint(distance, -np.inf, np.concatenate([target, -target])),
        ],
        integrality=np.concatenate([np.ones(n), np.zeros(n)]),
        bounds=Bounds(np.concatenate([floor, np.zeros(n)]), np.concatenate([size, np.full(n, np.inf)])),
    )
    keep = np.round(result.x[:n]) if result.x is not None else size
    for c, k in zip(members, keep, strict=True):
        cells[c].keep = int(k)


def _select(graph: DependencyGraph, scores: Mapping[int, Floats], cells: list[_Cell]) -> Allocation:
    gone = graph.analysis.components_of()
    removed: dict[int, list[npt.NDArray[np.int64]]] = defaultdict(list)
    for cell in cells:
        if cell.keep < len(cell.units):
            best = np.argsort(-scores[cell.group][cell.units], kind="stable")
            lost = np.sort(cell.units[best[cell.keep :]])
            removed[cell.group].append(lost)
            gone[graph.units(graph.groups[cell.group])[lost]] = True
    return Allocation({g: np.sort(np.concatenate(parts)) for g, parts in removed.items()}, gone)
