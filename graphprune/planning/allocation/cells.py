"""Parts of groups that lie alike in the equal-count constraints of the code, and numbers of units that obey these."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from ...dependency import DependencyGraph
from ...dependency.axes import Floats


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
class Cell:
    """Units of one group that lie in the same blocks of all equal-count constraints. `asked`: how many should stay
    before rounding; `keep`: how many do, at least `floor`."""

    group: int
    units: npt.NDArray[np.int64]
    asked: float = 0.0
    keep: int = 0
    floor: int = 1


# One block of an equal-count constraint: how many indices each unit of a cell takes in it, and how many are immovable
Block = tuple[dict[int, int], int]


def cells_of(graph: DependencyGraph, apart: bool) -> tuple[list[Cell], list[list[Block]]]:
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
    cells: list[Cell] = []
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
            cells.append(Cell(group.index, units))
    constraints = []
    for blocks in counted:
        made: list[Block] = []
        for labels, n in blocks:
            inside = cell_at[labels]
            free = inside >= 0
            made.append((dict(zip(inside[free].tolist(), n[free].tolist(), strict=True)), int(n[~free].sum())))
        if any(block != made[0] for block in made):
            constraints.append(made)
    return cells, constraints


@dataclasses.dataclass(frozen=True)
class System:
    """Constraints that are connected by cells, and those cells, ascending."""

    constraints: list[list[Block]]
    members: list[int]


def systems_of(cells: Sequence[Cell], constraints: list[list[Block]]) -> list[System]:
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
    found: dict[int, list[list[Block]]] = defaultdict(list)
    for blocks in constraints:
        first = next((c for block, _ in blocks for c in block), None)
        if first is not None:
            found[find(first)].append(blocks)
    return [System(s, sorted({c for blocks in s for block, _ in blocks for c in block})) for s in found.values()]


def solve(cells: list[Cell], system: System) -> None:
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


def select(graph: DependencyGraph, scores: Mapping[int, Floats], cells: list[Cell]) -> Allocation:
    """Of each cell the units with the least scores go, of equals those with the higher indices."""
    gone = graph.analysis.components_of()
    removed: dict[int, list[npt.NDArray[np.int64]]] = defaultdict(list)
    for cell in cells:
        if cell.keep < len(cell.units):
            best = np.argsort(-scores[cell.group][cell.units], kind="stable")
            lost = np.sort(cell.units[best[cell.keep :]])
            removed[cell.group].append(lost)
            gone[graph.units(graph.groups[cell.group])[lost]] = True
    return Allocation({g: np.sort(np.concatenate(parts)) for g, parts in removed.items()}, gone)
