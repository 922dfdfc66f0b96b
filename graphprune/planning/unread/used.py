"""What the recorded call has used of the attributes of modules."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping

from ...dependency.analysis import Analysis
from ...dependency.sizes import COMPARE, Resolution, describe
from ...plans.data import AttributeChange
from ...tracing.origin import Attribute, TensorSize, evaluate, leaves
from ...tracing.recorder import Guard


@dataclasses.dataclass(frozen=True)
class Used:
    """What the recorded call used of attributes: `known` are those that sizes, scales and plain numbers were read from,
    with what they must be; `guards` are comparisons, which must come out as recorded."""

    known: Mapping[Attribute, int]
    guards: tuple[Guard, ...]

    @classmethod
    def of(cls, analysis: Analysis, resolution: Resolution) -> Used:
        """From the analysis and its sizes solved."""
        guards = tuple(dict.fromkeys((*analysis.trace.guards, *analysis.guards)))
        plain = [side for guard in guards if guard.comparison == "same" for side in (guard.left, guard.right)]
        exprs = (*(site.expr for site in analysis.sites), *(site.expr for site in analysis.scalars), *plain)
        used = {leaf: leaf.value for expr in exprs for leaf in leaves(expr) if isinstance(leaf, Attribute)}
        compared = tuple(g for g in guards if any(isinstance(x, Attribute) for x in _sides(g)))
        return cls({**used, **resolution.read}, compared)

    @functools.cached_property
    def _guards_on(self) -> Mapping[tuple[str, str, tuple[int | str, ...]], list[Guard]]:
        """The comparisons of each attribute."""
        found = defaultdict[tuple[str, str, tuple[int | str, ...]], list[Guard]](list)
        for guard in self.guards:
            for at in dict.fromkeys((x.module, x.name, x.key) for x in _sides(guard) if isinstance(x, Attribute)):
                found[at].append(guard)
        return found

    def asks(self, change: AttributeChange) -> str:
        """The comparison that would come out otherwise with an attribute changed; "" where none would."""
        at = change.module, change.name, change.key

        def value(leaf: Attribute | TensorSize) -> int:
            if isinstance(leaf, Attribute):
                same = (leaf.module, leaf.name, leaf.key) == at
                return change.new if same else self.known.get(leaf, leaf.value)
            raise ArithmeticError  # a size of data: who knows

        for guard in self._guards_on.get(at, ()):
            try:
                same = COMPARE[guard.comparison](evaluate(guard.left, value), evaluate(guard.right, value))
            except (ArithmeticError, ValueError, TypeError):
                same = None
            if same != guard.outcome:
                return f"{describe(guard.left)} {guard.comparison} {describe(guard.right)}"
        return ""


def _sides(guard: Guard) -> Iterator[Attribute | TensorSize]:
    yield from leaves(guard.left)
    yield from leaves(guard.right)
