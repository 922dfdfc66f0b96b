"""What a rule says about its operands besides the coordinates of its result."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from ..tracing.origin import Expr
from ..tracing.recorder import Guard, Source
from .groups import GroupKind
from .state import AxisMap, Refine, Vector


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why positions cannot be removed. `kind` is one word for statistics, `text` a sentence for people.

    `place` is the line of the user's code where it is not that of `node`.
    """

    kind: str
    text: str
    node: fx.Node | None = dataclasses.field(default=None, compare=False)
    place: Source | None = None

    @property
    def source(self) -> Source | None:
        """The line of the user's code, if there is one."""
        return self.place or (self.node.meta.get("source") if self.node is not None else None)

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


Freeze = tuple[Vector, Reason]  # global positions that cannot be removed, and why


@dataclasses.dataclass(frozen=True, eq=False)
class Rewritten:
    """Modules whose code is written anew. `nodes`: the calls in it, whose sizes are free. `refused`: path of another
    module -> why no graph can stand for it."""

    nodes: frozenset[fx.Node] = frozenset()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def refusal(self, node: fx.Node) -> str:
        """Why no graph can stand for the module that makes this call; "" where nobody has asked."""
        return self.refused.get(node.meta.get("module", ""), "") if self.refused else ""


NOTHING_REWRITTEN = Rewritten()


def literal_text(what: str, number: float, source: Source | None) -> str:
    """A size that is no expression of others: a literal, in the statement at `source` or further up."""
    if source is None or re.search(rf"(?<![\w.]){abs(number)}(?![\w.])", source.statement):
        return f"{what} is the literal {number}"
    return f"{what} is the number {number}, handed to this line from elsewhere"


@dataclasses.dataclass(frozen=True, eq=False)
class SizeSite:
    """A size in the user's code that must come out right after pruning.

    The indices in `span` (all of the axis where None) that survive on an axis with coordinates `axis_map` and length
    `length` must number `evaluate(expr)`, unless `node` is rewritten: then the number is written anew.
    """

    node: fx.Node
    what: str
    expr: Expr
    axis_map: AxisMap
    length: int
    span: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarSite:
    """A number computed from sizes that scales a tensor (an attention temperature) and must keep its value: `node`
    multiplies (or divides) its input `operand` by `expr`."""

    node: fx.Node
    expr: Expr
    operand: fx.Node
    divide: bool


@dataclasses.dataclass(frozen=True, eq=False)
class EqualCounts:
    """Blocks of positions (global numbers) of which equally many must survive.

    `apart`: what happens to the blocks differs, so that units of different blocks are not interchangeable. `soft`:
    equal counts are only faster.
    """

    blocks: tuple[Vector, ...]
    text: str
    node: fx.Node
    apart: bool = False
    soft: bool = False


class Union(NamedTuple):
    """Positions of two Dims that go together, pair by pair: those with these coordinates, of which none is absent."""

    dim: int
    coordinates: Vector
    other: int
    others: Vector


@dataclasses.dataclass(slots=True)
class Effects:
    """Everything one node contributed; replaced as a whole when the node is analysed again."""

    unions: list[Union] = dataclasses.field(default_factory=list)
    freezes: list[Freeze] = dataclasses.field(default_factory=list)
    refines: list[Refine] = dataclasses.field(default_factory=list)
    sites: list[SizeSite] = dataclasses.field(default_factory=list)
    scalars: list[ScalarSite] = dataclasses.field(default_factory=list)
    guards: list[Guard] = dataclasses.field(default_factory=list)
    equal: list[EqualCounts] = dataclasses.field(default_factory=list)
    kinds: list[tuple[int, GroupKind]] = dataclasses.field(default_factory=list)
    statistics: list[Vector] = dataclasses.field(default_factory=list)


NO_EFFECTS = Effects()  # of every node that only brings a tensor in; never written to
