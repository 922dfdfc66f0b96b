"""The code of a network's classes beside the sizes that its layers have: what each number in it must be."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...tracing.blueprints import Alikeness, Summary, Width, below, summary_of
from ...tracing.blueprints.equations import sizes_of
from ...tracing.blueprints.solving import Number, Numbers, Placed, PlacedTerm, Side, Solution, solve
from ...tracing.origin import Attribute
from .methods import building
from .shapes import Removed, shapes_of, stated
from .used import Used

_NOTHING = nn.Identity()
# A number of the code in the network: module, name, and key.
_Name = tuple[str, str, tuple[int | str, ...]]
# A size before and after; None where it is not known.
_Sizes = tuple[int | None, int | None]


def is_torchs(module: nn.Module) -> bool:
    """A layer or a list of torch's own."""
    return type(module).__module__.startswith("torch.nn")


@dataclasses.dataclass(eq=False, slots=True)
class _Equation:
    """In the code the two are the same number: an expression, and another number or the size of a layer."""

    left: PlacedTerm
    right: int
    sizes: _Sizes


class Network:
    """The code of a network's classes beside the sizes that its layers have, before and after."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        removed: Removed,
        used: Used,
    ) -> None:
        self.modules = modules
        self.known = {(a.module, a.name, a.key): v for a, v in used.known.items()}
        self.before, self.after, cut = shapes_of(model, removed)
        self.cut_by_size: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name, axis in cut:
            self.cut_by_size[self.before[name][axis]].append((name, axis))
        self.alikeness = Alikeness()
        self.said: dict[str, Placed] = {}
        self._equations: dict[str, list[_Equation]] = {}
        self._numbers: dict[_Name, int] = {}
        self._of_parameters: list[int] = []
        self._sizes: dict[tuple[str, str, int | None], _Sizes] = {}

    def read(self, path: str) -> None:
        """The code of a module, and of those inside it that get numbers from it."""
        if path in self.said or is_torchs(self.modules.get(path, _NOTHING)):
            return
        self._add(path, summary_of(self.modules[path], self.alikeness))

    def _add(self, path: str, summary: Summary) -> None:
        placed = self.said[path] = Placed(summary, [self._number(path, leaf) for leaf in summary.places])
        said = self._equations[path] = []
        for equation, left in zip(summary.equations, summary.sides, strict=True):
            right, term = equation.right, PlacedTerm.of(left, placed)
            module = below(path, right.module)
            if isinstance(right, Width):
                said.append(_Equation(term, -1, self._measured(module, right.name, right.axis)))
            else:
                said.append(_Equation(term, placed.numbers[summary.places[right]], (None, None)))
                self.read(module.removesuffix("()"))

    def _number(self, path: str, leaf: Attribute) -> int:
        """Which number one in the code of an object at `path` is."""
        name = below(path, leaf.module), leaf.name, leaf.key
        found = self._numbers.get(name)
        if found is None:
            found = self._numbers[name] = len(self._numbers)
            if leaf.name.endswith("()"):
                self._of_parameters.append(found)
        return found

    def _measured(self, path: str, name: str, axis: int | None = None) -> _Sizes:
        key = path, name, axis
        found = self._sizes.get(key)
        if found is None:
            width = Width(path, name, axis)
            found = self._size(width, self.before, False), self._size(width, self.after, True)
            self._sizes[key] = found
        return found

    def _size(self, width: Width, shapes: Mapping[str, tuple[int, ...]], new: bool) -> int | None:
        module = self.modules.get(width.module)
        if module is None:
            return None
        prefix = f"{width.module}." if width.module else ""
        if width.name in module._parameters or width.name in module._buffers:
            shape = shapes.get(prefix + width.name, ())
            return shape[width.axis] if width.axis is not None and width.axis < len(shape) else None
        if sizes_of(module) is None:
            return None

        def number(name: str) -> int:
            now = vars(module).get(name)
            return self.known.get((width.module, name, ()), now) if new else now  # type: ignore[return-value]

        return stated(module, width, lambda name: shapes.get(prefix + name), number)

    def solve(self) -> tuple[Solution, Solution]:
        """The numbers of the code before and after."""
        old, kept = self._given()
        definitions = self._definitions()
        equations = [equation for said in self._equations.values() for equation in said]
        before = solve(_sides(equations, 0), definitions, old, {})
        sound = [e for e in equations if self._holds(e, before)]
        idle = {n: before.numbers[n] for n in self._of_parameters if n in before.numbers and n not in before.torn}
        return before, solve(_sides(sound, 1), definitions, kept, idle)

    def _given(self) -> tuple[Numbers, Numbers]:
        """What is known of numbers before and after: those that objects keep, and those that the call has read."""
        old, kept = Numbers(), Numbers()
        for path, placed in self.said.items():
            numbers = placed.numbers
            for place, value in placed.summary.known:
                old[numbers[place]] = value
            for name, key, place in placed.summary.kept:
                now = _kept(self.modules[path], name, key)
                if now is not None:
                    old[numbers[place]] = now
                    if (path, name, key) in self.known:
                        kept[numbers[place]] = self.known[path, name, key]
        for path, placed in self.said.items():
            for place in placed.summary.of_others:
                leaf = placed.summary.leaves[place]
                self._of_another(placed.numbers[place], below(path, leaf.module), leaf.name, old, kept)
        return old, kept

    def _of_another(self, number: int, path: str, name: str, old: Numbers, kept: Numbers) -> None:
        """`self.body.out_channels`: a size of a layer, or a number that another module keeps."""
        before, after = self._measured(path, name)
        if before is not None and after is not None:
            old[number], kept[number] = before, after
        elif (path, name, ()) in self.known:
            kept[number] = self.known[path, name, ()]

    def _definitions(self) -> list[Side]:
        """What numbers were computed from."""
        found: dict[int, Side] = {}
        for placed in self.said.values():
            for place, term in placed.summary.computed:
                number = placed.numbers[place]
                found[number] = Side(PlacedTerm.of(term, placed), number)
        return list(found.values())

    @staticmethod
    def _holds(equation: _Equation, before: Solution) -> bool:
        """The code made what is there. Otherwise it was misread, or somebody has changed the layer."""
        left = before.value(equation.left)
        size = before.number(equation.right) if equation.right >= 0 else equation.sizes[0]
        return left is None or size is None or left == size

    def term(self, attribute: Attribute) -> PlacedTerm | None:
        """What the code makes of an attribute; None where it does not say."""
        placed = self.said.get(attribute.module)
        parts = placed.summary.parts.get(attribute.name) if placed is not None else None
        part = None if parts is None else parts.get(attribute.key)
        return None if placed is None or part is None else placed.term(part)

    def found(self, attribute: Attribute, before: Solution, after: Solution) -> int | None:
        """What the attribute must be; None where that is not clear."""
        term = self.term(attribute)
        if term is not None:
            old, new = before.value(term), after.value(term)
        else:
            number = self._bare(attribute)
            old, new = before.number(number), after.number(number)
        if new is None or (old is not None and old != attribute.value):
            return None
        return int(new) if new == int(new) and new >= 1 else None

    def torn(self, attribute: Attribute, after: Solution) -> set[Number]:
        """The widths that differ, where the code makes layers with them from one number."""
        term = self.term(attribute)
        numbers = (self._bare(attribute),) if term is None else term.leaves
        return {value for number in numbers for value in after.torn.get(number, ())}

    def _bare(self, attribute: Attribute) -> int:
        """Which number an attribute itself is; -1 where the code does not speak of it."""
        return self._numbers.get((attribute.module, attribute.name, attribute.key), -1)

    def read_methods(self, missing: Iterable[Attribute]) -> bool:
        """What other methods would build with these attributes."""
        names: dict[str, set[str]] = defaultdict(set)
        for attribute in missing:
            names[attribute.module].add(attribute.name)
        more = False
        for path, needed in names.items():
            kind = type(self.modules[path])
            methods = building(kind, frozenset(needed)) if path in self.said else ()  # type: ignore[arg-type]
            if methods:
                said = summary_of(self.modules[path], self.alikeness, methods)
                more = more or len(said.equations) > len(self.said[path].summary.equations)
                self._add(path, said)
        return more


def _sides(equations: Iterable[_Equation], when: int) -> list[Side]:
    """Equations with the sizes before (0) or after (1); those with sizes that are not known say nothing."""
    found = []
    for equation in equations:
        if equation.right >= 0:
            found.append(Side(equation.left, equation.right))
        elif (size := equation.sizes[when]) is not None:
            found.append(Side(equation.left, -1, size))
    return found


def _kept(module: nn.Module, name: str, key: tuple[int | str, ...]) -> int | None:
    found: Any = vars(module).get(name)
    for step in key:
        found = found[step] if isinstance(found, (list, tuple)) and type(step) is int and step < len(found) else None
    return found if type(found) is int else None


__all__ = ["Network", "is_torchs"]
