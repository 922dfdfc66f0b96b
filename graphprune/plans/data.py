"""What a plan says, as data: which indices go and what changes with them, each of it immutable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ..dependency.groups import GroupKind
from ..dependency.temperature import Rescale
from ..dependency.whole.blocks import Block
from ..dependency.whole.experts import Experts
from ..support.versions import running_versions
from .latency import Latency
from .rewriting import Rewrite
from .structure import hash_of
from .surgery import Fold


@dataclasses.dataclass(frozen=True)
class AttributeChange:
    """`model.<module>.<name>[key...]` goes from `old` to `new`."""

    module: str
    name: str
    key: tuple[int | str, ...]
    old: int
    new: int

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path + "".join(f"[{k!r}]" for k in self.key) + f": {self.old} -> {self.new}"


@dataclasses.dataclass(frozen=True)
class UnsettledSize:
    """`model.<module>.<name>[key...]` stays `value`, although it may be a size that has changed; `why` says so."""

    module: str
    name: str
    key: tuple[int | str, ...]
    value: int
    why: str

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path + "".join(f"[{k!r}]" for k in self.key) + f" stays {self.value}: {self.why}"


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One group in the plan: how many of its units stay. `asked`: how many should have stayed by the ratio, before
    widths were rounded (a real number); None where there was no ratio for it. `weight`: what it counts in `Plan.asked`
    and `Plan.gone`: the multiply-accumulates it has a part in, relative to the other groups' mean."""

    name: str
    kind: GroupKind
    size: int
    kept: int
    asked: float | None = None
    weight: float = 1.0

    @property
    def rounded(self) -> bool:
        """Whether another number stays than the one asked for, rounded to nearest."""
        return self.asked is not None and abs(self.asked - self.kept) > 0.5


@dataclasses.dataclass(frozen=True)
class PlanData:
    """The fields of a `Plan`, which says what they mean, and what follows from them alone."""

    removed: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: tuple[AttributeChange, ...] = ()
    folds: tuple[Fold, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    groups: tuple[GroupPlan, ...] = ()
    frozen: tuple[str, ...] = ()
    structure: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    statistics: bool = False
    caches: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=running_versions)
    output: str = "module"
    rewrites: tuple[Rewrite, ...] = ()
    layers: tuple[Block, ...] = ()
    experts: tuple[Experts, ...] = ()
    latency: Latency | None = None
    unsettled: tuple[UnsettledSize, ...] = ()

    @property
    def asked(self) -> float | None:
        """The mean fraction that should go from the groups that a ratio speaks of, before widths are rounded; None
        without a ratio. Groups count by the multiply-accumulates that they have a part in."""
        return self._mean({i: g.asked for i, g in enumerate(self.groups) if g.asked is not None})

    @property
    def gone(self) -> float | None:
        """The same mean of the fractions that go."""
        return self._mean({i: g.kept for i, g in enumerate(self.groups) if g.asked is not None})

    def _mean(self, kept: Mapping[int, float]) -> float | None:
        groups = [(self.groups[i], k) for i, k in kept.items()]
        total = math.fsum(g.weight for g, _ in groups)
        return math.fsum(g.weight * (1 - k / g.size) for g, k in groups) / total if groups else None

    @property
    def empty(self) -> bool:
        """Nothing is removed (batch norms may still be folded)."""
        return not self.removed and not self.layers

    @property
    def changes_widths(self) -> bool:
        """It does something else than leaving layers out."""
        return any((self.removed, self.attributes, self.folds, self.rescales, self.rewrites, self.experts))

    @property
    def structural_hash(self) -> str:
        """A hash of the names and shapes of the model the plan was made for."""
        return hash_of(self.structure)
